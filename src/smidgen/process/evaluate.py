"""How well a model answers a split: classes by accuracy and macro-F1, texts by loss, perplexity and exact match.

Several processes share the batches of a split, and all of them get its scores. Sums are taken row by row in the order
of the rows, so that the size of the batches changes a score by the rounding of the model's own arithmetic alone
(about 1e-6 of a loss in fp32; padding changes how a kernel adds up).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from smidgen.process.batches import by_length, collate
from smidgen.process.encoding import Encoded
from smidgen.process.models import autocast, logits
from smidgen.process.parallel import in_turns, is_sharded
from smidgen.prompts import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scores = dict[str, Any]
T = TypeVar("T")

LARGEST_EXPONENT = 700.0
"""A perplexity beyond e^700 is no number; such a model has learned nothing."""

UNFINISHED = 4
"""Tokens that an answer may have beyond the longest expected one, before it is cut off."""


def evaluate(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    labels: Sequence[str],
    pad_id: int,
    batch_size: int = 32,
    precision: str = "fp32",
) -> Scores:
    """Score a model on labelled rows.

    Args:
        model: it is left in the mode it was in.
        rows: with labels.
        labels: the names of the classes; none for generation.
        pad_id: fills short rows.
        batch_size: rows at once.
        precision: number format of the activations.

    Returns:
        Classification: loss, accuracy, macro_f1 (over the classes that the rows have), per_class, confusion (one row a
        true class), predictions, targets.
        Generation: loss (of an answer's token), perplexity, row_losses (of a token, for each row), row_tokens.
    """

    def score(batch: list[Encoded]) -> list[tuple[float, int]]:
        inputs = collate(batch, pad_id)
        found = logits(model, inputs, precision)
        losses = loss_sum(found, inputs["labels"].to(found.device))
        answers = found.argmax(-1) if labels else torch.zeros_like(losses, dtype=torch.int64)
        return list(zip(losses.tolist(), answers.tolist(), strict=True))

    scored = _in_batches(model, rows, batch_size, score)
    losses = [loss for loss, _ in scored]
    if labels:
        targets = [row.labels for row in rows if isinstance(row.labels, int)]
        return {"loss": math.fsum(losses) / len(rows)} | _class_scores([found for _, found in scored], targets, labels)
    tokens = [sum(label != IGNORED for label in row.labels[1:]) for row in rows if not isinstance(row.labels, int)]
    mean = math.fsum(losses) / max(1, sum(tokens))
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, LARGEST_EXPONENT)),
        "row_losses": [loss / max(1, count) for loss, count in zip(losses, tokens, strict=True)],
        "row_tokens": tokens,
    }


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row, summed over its labels: (rows,).

    Args:
        logits: (rows, classes), or (rows, length, vocabulary), of which each column speaks of the next one's label.
        labels: (rows,) or (rows, length); IGNORED ones count nothing.
    """
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    nexts = labels[:, 1:]
    known = nexts != IGNORED
    losses = nn.functional.cross_entropy(logits[:, :-1][known].float(), nexts[known], reduction="none")
    return torch.zeros(known.shape, device=losses.device, dtype=losses.dtype).masked_scatter(known, losses).sum(1)


def longest_answer(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> int:
    """How many tokens to generate where these answers are expected."""
    ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return max(map(len, ids)) + UNFINISHED


def exact_match(given: Sequence[str], answers: Sequence[str]) -> float:
    """The share of rows whose given answer is the expected one, spaces at its ends aside."""
    return sum(text == answer.strip() for text, answer in zip(given, answers, strict=True)) / len(answers)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Encoded],
    *,
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 32,
    precision: str = "fp32",
) -> list[str]:
    """The greedy answer to each prompt, in their order, without spaces at its ends.

    Args:
        model: generates.
        tokenizer: turns its tokens into text.
        prompts: rows without their answers.
        pad_id: fills short prompts, on the left.
        max_new_tokens: where an answer is cut off; the model needs positions for them beside the longest prompt's.
        batch_size: rows at once.
        precision: number format of the activations.
    """

    def answer(batch: list[Encoded]) -> list[str]:
        inputs = collate(batch, pad_id, "left")
        with autocast(model, precision):
            tokens = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad_id,
                synced_gpus=is_sharded(model),
            )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    return _in_batches(model, prompts, batch_size, answer)


def _in_batches(
    model: PreTrainedModel, rows: Sequence[Encoded], batch_size: int, compute: Callable[[list[Encoded]], list[T]]
) -> list[T]:
    """What `compute` gives for each row, in the rows' order, by a model that learns nothing from it."""
    batches = by_length([len(row.input_ids) for row in rows], batch_size)
    with torch.no_grad(), _evaluating(model):
        results = in_turns(len(batches), lambda batch: compute([rows[row] for row in batches[batch]]))
    by_row = {
        row: result
        for batch, found in zip(batches, results, strict=True)
        for row, result in zip(batch, found, strict=True)
    }
    return [by_row[row] for row in range(len(rows))]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _class_scores(found: Sequence[int], targets: Sequence[int], labels: Sequence[str]) -> Scores:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(labels)))
    precision, recall, f1, support = precision_recall_fscore_support(targets, found, labels=classes, zero_division=0.0)
    return {
        "accuracy": sum(map(int.__eq__, found, targets)) / len(targets),
        "macro_f1": float(f1[support > 0].mean()),  # a class that no row has says nothing about the model
        "per_class": [
            {
                "label": label,
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "support": int(support[index]),
            }
            for index, label in enumerate(labels)
        ],
        "confusion": confusion_matrix(targets, found, labels=classes).tolist(),
        "predictions": list(found),
        "targets": list(targets),
    }
