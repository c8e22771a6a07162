"""Answers to new texts, in their order, a batch at a time: lines, .csv and .jsonl of any length need little memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from smidgen.process.batches import collate
from smidgen.process.data import Example
from smidgen.process.encoding import pad_id
from smidgen.process.models import logits
from smidgen.process.onednn import exact_onednn
from smidgen.process.spans import spans_of
from smidgen.process.tables import BadRow, stream_table

if TYPE_CHECKING:
    from smidgen.process.job import Job

MAX_NEW_TOKENS = 128
"""Of an answer, unless another number is asked for."""


def texts(source: str, column: str) -> Iterator[str | BadRow]:
    """The texts of a file's column, or the lines of standard input for "-"; bad rows in their places.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """
    if source == "-":
        for number, line in enumerate(sys.stdin.buffer, start=1):
            yield _line(number, line)
    else:
        for row in stream_table(source, (column,), field="rows"):
            yield row if isinstance(row, BadRow) else row[0]


def _line(number: int, line: bytes) -> str | BadRow:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        return BadRow("line", number, "broken UTF-8")
    return text if text.strip() else BadRow("line", number, "empty text")


def predict(
    job: Job,
    rows: Iterable[str | BadRow],
    *,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    tell: Callable[[str], object] = lambda note: None,
) -> Iterator[dict[str, Any]]:
    """Answer each text; a bad row gets an error in its place, so that answers and rows stay side by side.

    Args:
        job: a model with its adapter.
        rows: the texts.
        batch_size: how many at once.
        max_new_tokens: where a written answer is cut off; at a quarter of what the model takes in any case.
        tell: called after the last of them, if texts or answers were cut or rows were bad.

    Yields:
        Classification: text, label, score (the label's probability). Token classification: text, spans (start, end,
        label, and the text between). Generation: text, answer. For a bad row: error.
    """
    rows = iter(rows)
    count = all_cut = bad = unfinished = 0
    while batch := list(itertools.islice(rows, batch_size)):
        known = [row for row in batch if not isinstance(row, BadRow)]
        found, cut, stopped = _answer(job, known, max_new_tokens) if known else ([], 0, 0)
        unfinished += stopped
        count, all_cut, bad = count + len(known), all_cut + cut, bad + len(batch) - len(known)
        answers = iter(found)
        for row in batch:
            yield {"error": str(row)} if isinstance(row, BadRow) else {"text": row, **next(answers)}
    if bad:
        tell(f"{bad} of {count + bad} rows have an error instead of an answer.")
    if all_cut:
        room = job.room.prompt(max_new_tokens) if job.recipe.task == "generation" else job.room.row
        tell(f"{all_cut} of {count} texts are longer than {room} tokens; their ends were cut.")
    if unfinished:
        most = job.room.answer(max_new_tokens)
        tell(
            f"{unfinished} of {count} answers were cut off after {most} tokens. "
            + ("--max-new-tokens allows more." if most == max_new_tokens else "The model takes no longer ones.")
        )


def _answer(job: Job, known: list[str], max_new_tokens: int) -> tuple[list[dict[str, Any]], int, int]:
    """What is answered to texts, how many of them were cut, and how many answers."""
    if job.recipe.task == "generation":
        answers, cut = job.answer(known, max_new_tokens=max_new_tokens, batch_size=len(known))
        return [{"answer": answer.text} for answer in answers], cut, sum(not answer.is_whole for answer in answers)
    rows, cut = job.encode([Example(text) for text in known])
    pad, precision = pad_id(job.tokenizer), job.recipe.training.precision
    with torch.no_grad(), exact_onednn(job.model.device):
        best = logits(job.model, collate(rows, pad), precision).float().softmax(-1).max(-1)
    if job.recipe.task == "token-classification":
        tags = best.indices.tolist()
        found = [spans_of(own, row.offsets, job.labels) for own, row in zip(tags, rows, strict=True)]
        return (
            [
                {"spans": [{**span._asdict(), "text": text[span.start : span.end]} for span in spans]}
                for text, spans in zip(known, found, strict=True)
            ],
            cut,
            0,
        )
    return (
        [
            {"label": job.labels[index], "score": round(score, 6)}
            for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        cut,
        0,
    )
