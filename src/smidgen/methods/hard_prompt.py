"""Hard Prompts Made Easy: Gradient-Based Discrete Optimization for Prompt Tuning and Discovery.

Wen et al., 2023, arXiv:2302.03668.

PEZ: the wording of a prompt is optimized. Continuous rows are kept; a forward pass uses the vocabulary's rows nearest
to them, and the gradient taken there moves the continuous rows (section 3). What comes out is text: it is saved as the
vocabulary's rows, and `tokens` names them. Where we differ: nearest is by distance, where the authors' code takes the
cosine; and with a tokenizer, special tokens and tokens that are no text by themselves are never chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from smidgen.delta import Delta, Method, check_positive
from smidgen.layers import embedding_rows
from smidgen.methods.prompt_tuning import (
    check_placement,
    check_start,
    prompt_column,
    starting_tokens,
)
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardPrompt(Method):
    """Learns the wording of a prompt: real tokens before the text, chosen by gradients.

    Args:
        length: how many tokens; each takes a position from the text.
        start: "vocabulary" (sampled tokens) or "text" (those of `text`).
        text: the text to start from, repeated or cut to `length` tokens.
        placement: "first", "after-first" or "auto", as for prompt tuning.

    Raises:
        ValueError: a value is outside its range, or `start` and `text` do not go together.
    """

    name = "hard-prompt"
    title = "Hard prompt"
    paper = "arXiv:2302.03668"
    site = "embedding"
    learning_rates: ClassVar = {"encoder": 1e-2, "decoder": 1e-2}

    length: int = 12
    start: str = "vocabulary"
    text: str | None = None
    placement: str = "auto"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)
        check_start(self.title, self.start, self.text)
        if self.start == "random":
            raise ValueError(f"{self.title}'s start must be of real tokens: vocabulary or text, got 'random'.")
        check_placement(self.title, self.placement)

    @property
    def virtual_tokens(self) -> int:
        """The prompt occupies `length` positions."""
        return self.length

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The one delta, on the input embedding."""
        column = prompt_column(model, self.placement)
        return [HardPromptDelta(self.length, place.shape[1], column) for place in places]

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Set the rows by `start`, and find which tokens may be chosen."""
        for place, delta in zip(places, deltas, strict=True):
            assert isinstance(delta, HardPromptDelta)
            rows = embedding_rows(place.layer)
            delta.allowed = None if tokenizer is None else readable(tokenizer, len(rows)).to(rows.device)
            tokens = starting_tokens(self.title, model, self.start, self.text, self.length, tokenizer)
            delta.rows.copy_(rows[tokens])


class HardPromptDelta(Delta):
    """A prompt of real tokens; `rows` (length, hidden size) are the continuous ones, `column` where it stands."""

    allowed: Tensor | None = None

    def __init__(self, length: int, width: int, column: int) -> None:
        super().__init__()
        self.virtual_tokens = length
        self.column = column
        self.rows = nn.Parameter(torch.zeros(length, width))

    def tokens(self, embedding: nn.Module) -> Tensor:
        """The ids of the vocabulary's rows nearest to the continuous ones, (length,)."""
        return self._nearest(embedding_rows(embedding))

    def _nearest(self, vocabulary: Tensor) -> Tensor:
        with torch.no_grad():
            distances = torch.cdist(self.rows.float(), vocabulary.float())
            if self.allowed is not None:
                distances[:, ~self.allowed] = torch.inf
            return distances.argmin(1)

    def forward(self, embedding: nn.Module) -> Tensor:
        """(length, hidden size): the vocabulary's rows, with the continuous ones in their place for the gradient."""
        nearest = self.folded(embedding)["rows"]
        return nearest + (self.rows - self.rows.detach())

    def folded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The vocabulary's rows."""
        vocabulary = embedding_rows(layer)
        return {"rows": vocabulary[self._nearest(vocabulary)].to(self.rows.dtype)}


def readable(tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """Which of the `count` tokens of the vocabulary are text that reads back as themselves, (count,)."""
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(min(count, len(tokenizer))) if index not in special]
    texts = tokenizer.batch_decode([[index] for index in ids])
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    allowed = torch.zeros(count, dtype=torch.bool)
    allowed[[index for index, back in zip(ids, again, strict=True) if back == [index]]] = True
    return allowed
