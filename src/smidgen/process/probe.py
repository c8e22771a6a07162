"""Text that a model should not forget: its loss is watched while the model learns something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smidgen.errors import UserError
from smidgen.process.blocks import Blocks, Causal
from smidgen.process.corpus import pages, text_files, tokens_of
from smidgen.process.encoding import Encoded
from smidgen.process.recipe import ProbeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHARED = 12
"""Tokens in a row that two texts hardly share by chance."""


class Probe:
    """The watched text, ready to be scored.

    Args:
        rows: blocks of it.
        rise: see `ProbeConfig`.
        score: the loss of a token in rows.
    """

    def __init__(self, rows: Sequence[Encoded], rise: float, score: Callable[[Sequence[Encoded]], float]) -> None:
        self.rows, self.rise, self._score = rows, rise, score

    def loss(self) -> float:
        """The loss of a token now."""
        return self._score(self.rows)

    def is_forgotten(self, before: float, now: float) -> bool:
        """Whether the loss has risen by more than it may."""
        return now > (1 + self.rise) * before


def shared_rows(probe: Sequence[Encoded], rows: Sequence[Encoded]) -> int:
    """How many rows have SHARED tokens in a row that the probe has as well."""
    known = {sequence for row in probe for sequence in _sequences(row)}
    return sum(any(sequence in known for sequence in _sequences(row)) for row in rows)


def _sequences(row: Encoded) -> Iterator[tuple[int, ...]]:
    ids = row.input_ids
    return (tuple(ids[start : start + SHARED]) for start in range(len(ids) - SHARED + 1))


def probe_rows(config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The first blocks of the text.

    Raises:
        UserError: it is no text, or less than a block.
    """
    wanted, count = config.blocks * config.length + 1, 0
    found = [np.zeros(0, dtype="<u4")]
    for tokens in tokens_of(pages(text_files(config.text, field="probe.text")), tokenizer, tokenizer.eos_token_id):
        found.append(tokens)
        count += len(tokens)
        if count >= wanted:
            break
    stream = np.concatenate(found)[:wanted]
    blocks = Blocks(stream, Causal(config.length), 0)
    if not len(blocks):
        raise UserError(f"probe.text has {len(stream)} tokens, which make no block of {config.length}.")
    return [blocks[number] for number in range(len(blocks))]
