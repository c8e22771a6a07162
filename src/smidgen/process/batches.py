"""Which rows make up a step, for every process, and the tensors made of them: pure functions, so that nothing is saved.

A run that resumes needs its epoch and its position in it: `order` gives the same batches again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from smidgen.placeholders import IGNORED
from smidgen.process.encoding import Encoded

LARGEST_WINDOW = 50
"""Batches that are sorted by length together; more would leave less to chance."""


T = TypeVar("T", covariant=True)


class Numbered(Protocol[T]):
    """What can be had by its number, as a list's items can, whether or not all of it is in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> T: ...


class TrainingRows(Protocol):
    """What a run learns from: the rows of each part of an epoch, after which the model is scored, and of each step."""

    @property
    def parts(self) -> int:
        """Parts of an epoch."""

    def rows(self, part: int) -> Numbered[Encoded]:
        """The rows, of which a step's are taken; parts are counted from 0 through all epochs."""

    def batches(self, part: int) -> Numbered[Sequence[int]]:
        """The rows of each step, over all processes; every epoch has the same number of them."""


@dataclasses.dataclass(frozen=True)
class WholeEpochs:
    """The same rows in every epoch, in an order of its own.

    Args:
        examples: the rows.
        batch_size: rows of a step.
        seed: of the order.
    """

    examples: Sequence[Encoded]
    batch_size: int
    seed: int
    parts: ClassVar[int] = 1

    def rows(self, part: int) -> Sequence[Encoded]:
        """All rows."""
        return self.examples

    def batches(self, part: int) -> list[list[int]]:
        """See `order`."""
        lengths = [len(row.input_ids) for row in self.examples]
        return order(lengths, self.batch_size, seed=self.seed, epoch=part)


def order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each step of an epoch, over all processes.

    The rows are shuffled, sorted by length inside windows of many batches (a quarter of the epoch at most), and cut
    into batches, which are shuffled in turn; so there is little padding, and rows meet others in every epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the run.
        epoch: counted from 0; each has its own order.

    Returns:
        Batches of row indices. Each row occurs exactly once; a batch that is smaller than the others comes last.
    """
    rows = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    window = batch_size * max(1, min(LARGEST_WINDOW, len(lengths) // batch_size // 4))
    tokens = np.asarray(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        near = rows[start : start + window]
        near = near[np.argsort(-tokens[near], kind="stable")]
        batches += [near[cut : cut + batch_size].tolist() for cut in range(0, len(near), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    places = np.random.default_rng([seed, epoch, 1]).permutation(len(full))
    return [full[place] for place in places] + [batch for batch in batches if len(batch) < batch_size]


def by_length(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> list[list[int]]:
    """Batches for evaluation, as `pieces` cuts them: the longest rows first, so that a lack of memory shows at once."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return pieces(rows, [lengths[row] for row in rows], batch_size, most_tokens)


def pieces(
    rows: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Rows cut into pieces, in their order, each as long as it may be.

    Args:
        rows: the longest first, if their tokens count.
        lengths: tokens of each of them.
        most_rows: of a piece.
        most_tokens: of a piece whose rows are padded to its longest; a row with more is alone. None: any number.
    """
    found: list[list[int]] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length)
        full = not found or len(found[-1]) == most_rows
        if full or (most_tokens is not None and (len(found[-1]) + 1) * longest > most_tokens):
            found.append([])
            longest = length
        found[-1].append(row)
    return found


def micro_batches(
    batch: Sequence[int],
    lengths: Sequence[int],
    *,
    process: int = 0,
    processes: int = 1,
    most_rows: int | None = None,
    most_tokens: int | None = None,
) -> list[list[int]]:
    """One process's part of a batch, in the pieces that it passes through the model one after the other.

    Every process gets the same number of pieces, because FSDP's gathering waits for all of them.
    A piece is empty where a process has no row left (a last batch of 3 rows on 4 processes). The process then
    passes `idle` rows through the model, which have a length but no label, and so take part without a loss or a
    gradient:

        for piece in micro_batches(batch, lengths, process=rank, processes=world, most_rows=size):
            inputs = collate([data[row] for row in piece] or [idle(data[batch[-1]])], pad_id)
            loss = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels_in_the_whole_batch

    The sum over all pieces and processes is then the loss of the batch in one piece, whatever the number of processes;
    a mean over each piece would weigh rows unequally, and be 0/0 for an idle one. Gradients are summed over the
    processes in turn, never averaged (`parallel.sum_gradients`). The tokens of idle rows are not the run's.

    Args:
        batch: the rows of one step, as `order` gives them.
        lengths: tokens of each of them.
        process: this process's rank.
        processes: how many there are.
        most_rows: of a piece; None: any number.
        most_tokens: of a piece, as in `pieces`; its rows are then of like length.

    Returns:
        Pieces of row indices. Over all processes each row of the batch occurs exactly once, and the processes' parts
        differ by one row at most.
    """
    parts = []
    for number in range(processes):
        places = list(range(number, len(batch), processes))
        if most_tokens is not None:
            places.sort(key=lambda place: -lengths[place])
        own, tokens = [batch[place] for place in places], [lengths[place] for place in places]
        parts.append(pieces(own, tokens, most_rows or len(batch), most_tokens))
    return parts[process] + [[] for _ in range(max(map(len, parts)) - len(parts[process]))]


def idle(row: Encoded) -> Encoded:
    """The same tokens with nothing to learn from them."""
    nothing = IGNORED if isinstance(row.labels, int) else [IGNORED] * len(row.labels)
    return dataclasses.replace(row, labels=nothing)


def collate(rows: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """Pads rows to the longest of them.

    Args:
        rows: at least one.
        pad_id: the token in the padding; what it is does not matter, since the attention mask hides it.
        side: where the padding goes: right for training, left for generation, which goes on at the right end.

    Returns:
        `input_ids` and `attention_mask`, int64 (rows, longest), and `labels`, int64: (rows,) for classes, (rows,
        longest) for tokens, with IGNORED in the padding.
    """
    longest = max(len(row.input_ids) for row in rows)

    def padded(lists: Sequence[list[int]], filler: int) -> Tensor:
        pads = [[filler] * (longest - len(values)) for values in lists]
        joined = zip(pads, lists, strict=True) if side == "left" else zip(lists, pads, strict=True)
        return torch.tensor([first + second for first, second in joined], dtype=torch.int64)

    classes = [row.labels for row in rows if isinstance(row.labels, int)]
    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": torch.tensor(classes, dtype=torch.int64)
        if classes
        else padded([row.labels for row in rows if not isinstance(row.labels, int)], IGNORED),
    }
