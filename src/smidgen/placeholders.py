"""The columns of virtual tokens in ids, masks and outputs: how many each row has, and where they go in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from smidgen.delta import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
"""The label that no loss counts."""


class Counts(NamedTuple):
    """How many virtual tokens the rows of a batch have.

    Attributes:
        each: of each row, (batch,).
        most: of the row that has the most of them.
        uneven: whether rows may differ, since some are served by other adapters.
    """

    each: Tensor
    most: int
    uneven: bool


def counted(deltas: Sequence[Delta], rows: Tensor) -> Counts:
    """How many virtual tokens the deltas have in the rows of a batch."""
    whole = sum(delta.virtual_tokens for delta in deltas)
    if all(delta.route is None for delta in deltas):  # no look at a tensor, so that torch.compile needs no break
        return Counts(torch.full((rows.shape[0],), whole, device=rows.device), whole, uneven=False)
    total = torch.zeros(rows.shape[0], dtype=torch.long)
    for delta in deltas:
        total[served_rows(delta, rows)] += delta.virtual_tokens
    most = int(total.max())
    return Counts(total.to(rows.device), most, uneven=bool((total < most).any()))


def served_rows(delta: Delta, rows: Tensor) -> Tensor:
    """The numbers of the rows that the delta serves."""
    if delta.route is None:
        return torch.arange(rows.shape[0])
    return torch.tensor(delta.route.served(rows)).long()


def insert(rows: Tensor, start: int, count: int, value: int | Tensor) -> Tensor:
    """(batch, length) with `count` columns of `value`, one or (batch, 1), at `start`: (batch, length + count)."""
    columns = rows.new_empty(rows.shape[0], count)
    columns[:] = value
    return torch.cat([rows[:, :start], columns, rows[:, start:]], dim=1)


def insert_mask(mask: Tensor, start: int, counts: Counts) -> Tensor:
    """A mask (batch, length) with columns at `start`, of which each row sees as many of the last as it has tokens."""
    columns = torch.arange(counts.most, device=mask.device) >= counts.most - counts.each[:, None]
    return torch.cat([mask[:, :start], columns.to(mask.dtype), mask[:, start:]], dim=1)


def cut(rows: Tensor, columns: slice) -> Tensor:
    """(batch, length, ...) without `columns`."""
    return torch.cat([rows[:, : columns.start], rows[:, columns.stop :]], dim=1)


def placeholder(model: PreTrainedModel) -> int:
    """An id that no model treats specially: neither padding nor an end of text."""
    special: set[int | None] = set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        value = getattr(model.config, name, None)
        special.update(value if isinstance(value, list) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def check_padding(mask: Tensor, start: int) -> None:
    """Raise a ValueError if a prompt after the first token would come after a row's padding, (batch, length)."""
    wrong = "A prompt after the first token needs texts that are padded on the right."
    if start and torch.compiler.is_compiling():
        torch._assert_async(mask[:, 0].all(), wrong)
    elif start and not bool(mask[:, 0].all()):
        raise ValueError(wrong)
