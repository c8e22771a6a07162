"""How well a model answers a split: classes by accuracy, spans by F1, texts by loss, perplexity and exact match.

Several processes share the batches of a split, and all of them get its scores. Sums are taken row by row in the order
of the rows, so that the size of the batches changes a score by the rounding of the model's own arithmetic alone
(about 1e-6 of a loss in fp32; padding changes how a kernel adds up).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.layers import is_sharded
from smidgen.modes import evaluating
from smidgen.placeholders import IGNORED
from smidgen.process.batches import by_length, collate
from smidgen.process.encoding import Encoded
from smidgen.process.models import autocast, logits
from smidgen.process.onednn import exact_onednn
from smidgen.process.parallel import in_turns
from smidgen.process.scores import Scores, calibration, class_scores, perplexity, span_scores
from smidgen.process.spans import spans_of
from smidgen.process.word_losses import plain_head, word_losses
from smidgen.prompt_states import prompts_kept
from smidgen.trunk import computing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smidgen.process.frozen_states import FrozenStates

T = TypeVar("T")

UNFINISHED = 4
"""Tokens that an answer may have beyond the longest expected one, before it is cut off."""


def evaluate(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    labels: Sequence[str],
    pad_id: int,
    batch_size: int = 32,
    most_tokens: int | None = None,
    precision: str = "fp32",
    frozen: FrozenStates | None = None,
) -> Scores:
    """Score a model on labelled rows.

    Args:
        model: it is left in the mode it was in.
        rows: with labels.
        labels: the names of the classes, or of the spans' labels; none for generation.
        pad_id: fills short rows.
        batch_size: rows at once.
        most_tokens: tokens at once, padding included; None: any number.
        precision: number format of the activations.
        frozen: keeps states of the rows for the next time; None: there is none.

    Returns:
        Classification: loss, accuracy, macro_f1 (over the classes that the rows have), per_class, confusion (one row a
        true class), predictions, targets.
        Token classification: loss (of a token's tag), precision, recall, f1 (of spans, each right if its ends and its
            label are), macro_f1, per_class, row_hits (right spans of each row), row_spans (found and true ones).
        Generation: loss (of an answer's token), perplexity, row_losses (of a token, for each row), row_tokens.
    """

    def score(batch: list[Encoded]) -> list[tuple[float, Any, Any]]:
        inputs = collate(batch, pad_id)
        with contextlib.nullcontext() if frozen is None else frozen.given(batch):
            if not labels:
                return [(loss, None, None) for loss in row_losses(model, inputs, precision).tolist()]
            found = logits(model, inputs, precision)
        losses = loss_sum(found, inputs["labels"].to(found.device))
        chances = found.float().softmax(-1).cpu().numpy() if found.dim() == 2 else [None] * len(batch)
        return list(zip(losses.tolist(), found.argmax(-1).tolist(), chances, strict=True))

    if frozen is not None:
        with evaluating(model):
            frozen.keep(rows)
    scored = _in_batches(model, rows, batch_size, most_tokens, score)
    losses, answers, chances = [row[0] for row in scored], [row[1] for row in scored], [row[2] for row in scored]
    tokens = [count_labels(row) for row in rows]
    mean = math.fsum(losses) / max(1, sum(tokens))
    if labels:
        if classes := [row.labels for row in rows if isinstance(row.labels, int)]:
            trust = calibration(np.stack(chances), np.array(classes))
            return {"loss": mean, **class_scores(answers, classes, labels), **trust}
        found = [spans_of(tags, row.offsets, labels) for tags, row in zip(answers, rows, strict=True)]
        return {"loss": mean, **span_scores(found, [row.spans for row in rows], labels)}
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "row_losses": [loss / max(1, count) for loss, count in zip(losses, tokens, strict=True)],
        "row_tokens": tokens,
    }


def row_losses(model: PreTrainedModel, batch: Mapping[str, Tensor], precision: str) -> Tensor:
    """The cross-entropy of each row, summed over its labels: (rows,).

    Args:
        model: on any device.
        batch: as `collate` gives it.
        precision: number format of the activations.
    """
    labels = batch["labels"].to(model.device)
    head = plain_head(model, batch, precision) if labels.dim() == 2 else None
    if head is None:
        return loss_sum(logits(model, batch, precision), labels)
    compute = head.forward
    with computing([head], lambda states: states if states.dim() == 2 else compute(states)):
        found = logits(model, batch, precision)
    if found.dim() == 3:  # prompts made the text longer
        return loss_sum(found, labels)
    known = labels != IGNORED
    with autocast(model, precision):
        return _by_row(word_losses(found, head.weight, head.bias, labels[known]), known)


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row, summed over its labels: (rows,).

    Args:
        logits: (rows, classes); (rows, length, tags or vocabulary); or (labels, vocabulary), of the labels that count.
        labels: (rows,) or (rows, length); IGNORED ones do not count.
    """
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    known = labels != IGNORED
    found = logits[known] if logits.dim() == 3 else logits
    return _by_row(nn.functional.cross_entropy(found.float(), labels[known], reduction="none"), known)


def _by_row(losses: Tensor, known: Tensor) -> Tensor:
    """The sum of each row's labels' losses, which are in their order."""
    return torch.zeros(known.shape, device=losses.device, dtype=losses.dtype).masked_scatter(known, losses).sum(1)


def count_labels(row: Encoded) -> int:
    """How many answers of the model a row's loss is the sum of."""
    return sum(label != IGNORED for label in ([row.labels] if isinstance(row.labels, int) else row.labels))


def longest_answer(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> int:
    """How many tokens to generate where these answers are expected."""
    ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return max(map(len, ids)) + UNFINISHED


class Answer(NamedTuple):
    """What was written, without spaces at its ends, and whether it came to its end before it was cut off."""

    text: str
    is_whole: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Encoded],
    *,
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 32,
    precision: str = "fp32",
) -> list[Answer]:
    """The greedy answer to each prompt, in their order.

    Args:
        model: generates.
        tokenizer: turns its tokens into text.
        prompts: rows without their answers.
        pad_id: fills short prompts, on the left.
        max_new_tokens: where an answer is cut off; the model needs positions for them beside the longest prompt's.
        batch_size: rows at once.
        precision: number format of the activations.
    """

    def answer(batch: list[Encoded]) -> list[Answer]:
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
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = torch.isin(new, ends.to(new.device)).any(1).tolist()
        return [Answer(text.strip(), is_whole) for text, is_whole in zip(written, ended, strict=True)]

    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end).view(-1)
    return _in_batches(model, prompts, batch_size, None, answer)


def _in_batches(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    batch_size: int,
    most_tokens: int | None,
    compute: Callable[[list[Encoded]], list[T]],
) -> list[T]:
    """What `compute` gives for each row, in the rows' order, by a model that learns nothing from it."""
    batches = by_length([len(row.input_ids) for row in rows], batch_size, most_tokens)
    with torch.no_grad(), evaluating(model), exact_onednn(model.device), prompts_kept():
        results = in_turns(len(batches), lambda batch: compute([rows[row] for row in batches[batch]]))
    by_row = {
        row: result
        for batch, found in zip(batches, results, strict=True)
        for row, result in zip(batch, found, strict=True)
    }
    return [by_row[row] for row in range(len(rows))]
