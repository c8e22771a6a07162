"""Blocks of a stream of tokens as rows to train on: the next token is to be found, or those behind a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smidgen.placeholders import IGNORED
from smidgen.process.corpus import CONTINUES, Numbers
from smidgen.process.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION = 2**32 - 1
"""In the place of an epoch: the masks of the validation blocks are always the same."""


@dataclasses.dataclass(frozen=True)
class Causal:
    """Every token is to be found from those before it.

    Args:
        length: tokens of a block.
    """

    length: int

    def count(self, stream: Numbers) -> int:
        """How many whole blocks a stream has."""
        return max(0, len(stream) - 1) // self.length

    def block(self, stream: Numbers, number: int, epoch: int) -> Encoded:
        """A block; its last token answers with the first of the next."""
        tokens = (stream[number * self.length : (number + 1) * self.length + 1] & ~CONTINUES).tolist()
        return Encoded(tokens[:-1], tokens[1:])


@dataclasses.dataclass(frozen=True)
class Masked:
    """Some tokens are hidden, and to be found from all others: Devlin et al., 2018, arXiv:1810.04805, section 3.1.

    Of the hidden ones eight in ten are the mask token, one is drawn from the vocabulary, and one stays as it is.

    Args:
        length: tokens of a block, the tokenizer's own at its ends included.
        share: how many are hidden.
        whole_words: whether all tokens of a word are hidden together.
        seed: of what is hidden, with the epoch and the block's number.
        mask: the mask token.
        vocabulary: how many tokens there are.
        never: tokens that are not hidden, such as those between documents.
        before: the tokenizer's own tokens at the start of a block.
        after: those at its end.
    """

    length: int
    share: float
    whole_words: bool
    seed: int
    mask: int
    vocabulary: int
    never: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, length: int, share: float, whole_words: bool, seed: int
    ) -> Masked:
        """With what the tokenizer has: its mask, and what it puts around a text.

        Raises:
            ValueError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token.")
        found = tokenizer("a", return_special_tokens_mask=True)
        ids: list[int] = found["input_ids"]
        text = [place for place, special in enumerate(found["special_tokens_mask"]) if not special]
        return cls(
            length=length,
            share=share,
            whole_words=whole_words,
            seed=seed,
            mask=tokenizer.mask_token_id,
            vocabulary=len(tokenizer),
            never=tuple(tokenizer.all_special_ids),
            before=tuple(ids[: text[0]]),
            after=tuple(ids[text[-1] + 1 :]),
        )

    @property
    def room(self) -> int:
        """Tokens of the stream in a block."""
        return self.length - len(self.before) - len(self.after)

    def count(self, stream: Numbers) -> int:
        """How many whole blocks a stream has."""
        return len(stream) // self.room

    def block(self, stream: Numbers, number: int, epoch: int) -> Encoded:
        """A block, with the masks that it has in this epoch."""
        found = stream[number * self.room : (number + 1) * self.room]
        tokens = (found & ~CONTINUES).astype(np.int64)
        random = np.random.default_rng([self.seed, epoch, number])
        hidden = self._hidden(tokens, (found & CONTINUES) != 0, random)
        labels = np.where(hidden, tokens, IGNORED)
        lot = random.random(len(tokens))
        shown = np.where(hidden & (lot < 0.8), self.mask, tokens)
        drawn = hidden & (lot >= 0.8) & (lot < 0.9)
        shown[drawn] = random.integers(self.vocabulary, size=int(drawn.sum()))
        aside = [IGNORED] * len(self.before), [IGNORED] * len(self.after)
        return Encoded([*self.before, *shown.tolist(), *self.after], [*aside[0], *labels.tolist(), *aside[1]])

    def _hidden(
        self, tokens: NDArray[np.int64], continues: NDArray[np.bool_], random: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Which tokens are hidden: words in a random order, but for those that would make more than the share.

        The tokens of a word that has more than the share alone are words of their own: text without white space.
        """
        allowed = ~np.isin(tokens, self.never)
        wanted = max(1, round(self.share * int(allowed.sum())))
        words = np.cumsum(~continues if self.whole_words else np.ones_like(continues))
        long = np.bincount(words[allowed], minlength=len(tokens) + 1)[words] > wanted
        words = np.where(long, len(tokens) + 1 + np.arange(len(tokens)), words)
        kinds, sizes = np.unique(words[allowed], return_counts=True)
        chosen, left = [], wanted
        for place in random.permutation(len(kinds)):
            if sizes[place] <= left:
                chosen.append(kinds[place])
                left -= int(sizes[place])
        return allowed & np.isin(words, chosen)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a stream in one epoch, each made when it is asked for.

    Args:
        stream: the tokens.
        task: `Causal` or `Masked`.
        epoch: counted from 0, or VALIDATION.
    """

    stream: Numbers
    task: Causal | Masked
    epoch: int

    def __len__(self) -> int:
        return self.task.count(self.stream)

    def __getitem__(self, number: int) -> Encoded:
        """A block."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.task.block(self.stream, number, self.epoch)


@dataclasses.dataclass(frozen=True)
class CorpusRows:
    """What a run learns from a corpus: all blocks in every epoch, in an order of its own.

    Args:
        stream: the tokens.
        task: `Causal` or `Masked`.
        batch_size: blocks of a step.
        seed: of the order.
        scorings: parts of an epoch, after each of which the model is scored; no more than there are steps.
    """

    stream: Numbers
    task: Causal | Masked
    batch_size: int
    seed: int
    scorings: int = 1

    @property
    def parts(self) -> int:
        """Parts of an epoch, each with a step at least."""
        return min(self.scorings, self._steps)

    @property
    def _steps(self) -> int:
        return -(-self.task.count(self.stream) // self.batch_size)

    def rows(self, part: int) -> Blocks:
        """The blocks as they are in the epoch of this part."""
        return Blocks(self.stream, self.task, part // self.parts)

    def batches(self, part: int) -> Batches:
        """The blocks of each step of a part; none is held in memory before it is asked for."""
        epoch, place = divmod(part, self.parts)
        count = self.task.count(self.stream)
        steps = self._steps
        steps_of_part = range(place * steps // self.parts, (place + 1) * steps // self.parts)
        return Batches(steps_of_part, self.batch_size, count, shuffle(count, [self.seed, epoch]))


@dataclasses.dataclass(frozen=True)
class Batches:
    """The blocks of some steps of an epoch.

    Args:
        steps: which.
        size: blocks of a step; the last of an epoch may have fewer.
        count: blocks of the epoch.
        shuffled: their order.
    """

    steps: range
    size: int
    count: int
    shuffled: Callable[[int], int]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> list[int]:
        """The blocks of a step."""
        start = self.steps[place] * self.size
        return [self.shuffled(number) for number in range(start, min(start + self.size, self.count))]


def shuffle(count: int, seed: Sequence[int]) -> Callable[[int], int]:
    """A random order of the numbers below `count`, a number at a time: a Feistel network that stays below it.

    A permutation in memory would take eight bytes a block; this takes none, and a run that resumes needs no more of it.
    """
    half = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [int(key) for key in np.random.SeedSequence(list(seed)).generate_state(4, np.uint64)]

    def once(number: int) -> int:
        left, right = number >> half, number & low
        for key in keys:
            mixed = (right * 0x9E3779B97F4A7C15 + key) & (2**64 - 1)
            mixed ^= mixed >> 29
            mixed = (mixed * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & low)
        return left << half | right

    def place(number: int) -> int:
        found = once(number)
        while found >= count:
            found = once(found)
        return found

    return place
