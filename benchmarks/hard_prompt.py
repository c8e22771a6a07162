"""A hard prompt against hand-written ones of the same length: SmolLM2 says whether a tweet is positive or negative.

    python benchmarks/hard_prompt.py benchmarks/results/hard-prompt.json [--steps 100]

The model reads PROMPT, the tweet, and "Sentiment:", and its answer is the likelier of " positive" and " negative". The
learned prompt starts from the hand-written one that is best on the validation rows, with as many tokens; of all the
wordings that it passes through, the best on the validation rows is kept. It is scored on the test rows as text: typed
before the tweet and tokenized anew, for the plain model without an adapter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smidgen import HardPrompt, attach
from smidgen.files import write_json
from smidgen.process.data import TaskData, load_data
from smidgen.process.models import load_model
from smidgen.process.recipe import DataConfig
from smidgen.process.statistics import Ratios, difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HAND_WRITTEN = (
    "Is the sentiment of this tweet positive or negative?",
    "Decide whether the next tweet is positive or negative.",
    "Classify the sentiment of the tweet below as positive or negative.",
)
REST = "\nTweet: {text}\nSentiment:"
LENGTH = 48
"""Tokens of a tweet that are read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=0.008)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the validation rows")
    parser.add_argument("--validation", type=int, default=343, help="validation rows")
    chosen = parser.parse_args()
    data = load_data(DataConfig(train="embedded:tweets", test_share=0.3), "classification")
    model, tokenizer = load_model("embedded:smollm2", "generation", (), seed=0, precision="fp32")
    model.eval()
    task = Task(model, tokenizer, data)

    looked = {prompt: task.accuracy(prompt, "validation", chosen.validation) for prompt in HAND_WRITTEN}
    print(looked, flush=True)
    start = max(looked, key=lambda prompt: looked[prompt])
    learned, history, seconds = task.learn(start, chosen)
    right = {prompt: task.right(prompt, "test") for prompt in (*HAND_WRITTEN, learned)}
    low, high = difference(*(Ratios(right[prompt][None], np.ones((1, len(data.test)))) for prompt in (learned, start)))
    results = {
        "model": "embedded:smollm2",
        "test_rows": len(data.test),
        "tokens": len(task.ids(start)),
        "hand_written": [
            {"prompt": prompt, "validation": looked[prompt], "test": float(right[prompt].mean())}
            for prompt in HAND_WRITTEN
        ],
        "learned": {
            "prompt": learned,
            "started_from": start,
            "test": float(right[learned].mean()),
            "difference": float(right[learned].mean() - right[start].mean()),
            "difference_95": [low, high],
        },
        "steps": chosen.steps,
        "batch_size": chosen.batch_size,
        "learning_rate": chosen.learning_rate,
        "history": history,
        "seconds": seconds,
    }
    write_json(chosen.results, results)
    print(chosen.results.read_text())


class Task:
    """The tweets, and how the model is asked about them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TaskData) -> None:
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.answers = torch.tensor([self.ids(f" {label}")[0] for label in data.labels])

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, prompt: str, texts: Sequence[str]) -> Tensor:
        """(rows, labels): how likely the model finds each label's word after a prompt and the rest."""
        before, after = REST.split("{text}")
        tweets = [self.ids(prompt + before + text)[: len(self.ids(prompt)) + LENGTH] for text in texts]
        rows = [tweet + self.ids(after) for tweet in tweets]
        longest = max(map(len, rows))
        pad = self.model.config.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[torch.arange(len(rows)), lengths - 1][:, self.answers]

    def right(self, prompt: str, split: str, count: int | None = None) -> NDArray[np.float64]:
        """Which rows of a split are answered rightly: 1 or 0 each."""
        examples = getattr(self.data, split)[:count]
        found = []
        with torch.no_grad():
            for start in range(0, len(examples), 32):
                rows = examples[start : start + 32]
                best = self.logits(prompt, [row.text for row in rows]).argmax(1)
                found.append(best == torch.tensor([row.label for row in rows]))
        return torch.cat(found).double().numpy()

    def accuracy(self, prompt: str, split: str, count: int | None = None) -> float:
        """The share of them."""
        return float(self.right(prompt, split, count).mean())

    def learn(self, start: str, chosen: argparse.Namespace) -> tuple[str, list[dict[str, object]], float]:
        """The best wording on the validation rows, every wording that was looked at, and the seconds that it took."""
        began = time.perf_counter()
        method = HardPrompt(length=len(self.ids(start)), start="text", text=start, placement="first")
        adapter = attach(self.model, method, tokenizer=self.tokenizer)
        (delta,) = adapter.deltas[0]
        embedding = self.model.get_input_embeddings()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=chosen.learning_rate, weight_decay=0.0)
        draw = torch.Generator().manual_seed(0)
        looked: dict[str, float] = {}
        history: list[dict[str, object]] = []
        loss_sum = 0.0
        for step in range(1, chosen.steps + 1):
            rows = [
                self.data.train[row]
                for row in torch.randperm(len(self.data.train), generator=draw)[: chosen.batch_size]
            ]
            loss = nn.functional.cross_entropy(
                self.logits("", [row.text for row in rows]), torch.tensor([row.label for row in rows])
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += float(loss.detach())
            if step % chosen.every:
                continue
            wording = self.tokenizer.decode(delta.tokens(embedding))
            if wording not in looked:
                with adapter.disabled():
                    looked[wording] = self.accuracy(wording, "validation", chosen.validation)
            history.append(
                {"step": step, "loss": loss_sum / chosen.every, "validation": looked[wording], "prompt": wording}
            )
            print(history[-1], flush=True)
            loss_sum = 0.0
        adapter.detach()
        return max(looked, key=lambda prompt: looked[prompt]), history, time.perf_counter() - began


if __name__ == "__main__":
    main()
