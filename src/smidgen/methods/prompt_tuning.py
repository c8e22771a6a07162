"""The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al., 2021, arXiv:2104.08691.

A few learned rows of the input embedding stand before the text; everything else is frozen (section 2). They start at
random, at sampled vocabulary rows or at a text's rows (section 3.2). Where we differ: random rows have the size of the
model's own embedding rows instead of [-0.5, 0.5], which fits T5 alone; sampled rows are any of the vocabulary, the
paper's the most common 5,000 tokens'; and on encoders they stand after the first
token, so that the one that the classifier reads stays first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from smidgen.delta import Delta, Method, check_positive
from smidgen.layers import input_embedding, is_causal
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STARTS = ("random", "vocabulary", "text")
PLACEMENTS = ("auto", "first", "after-first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Learns a soft prompt: rows of the input embedding before the text.

    Args:
        length: how many virtual tokens; each takes a position from the text.
        start: "random", "vocabulary" (sampled rows) or "text" (the rows of `text`).
        text: the text to start from, repeated or cut to `length` tokens.
        placement: "first", "after-first" (after the first token, such as [CLS]), or "auto": after the first token on
            encoders, first on decoders.

    Raises:
        ValueError: a value is outside its range, or `start` and `text` do not go together.
    """

    name = "prompt-tuning"
    title = "Prompt tuning"
    paper = "arXiv:2104.08691"
    site = "embedding"
    learning_rates: ClassVar = {"encoder": 1.5e-2, "decoder": 1e-2}

    length: int = 20
    start: str = "vocabulary"
    text: str | None = None
    placement: str = "auto"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)
        check_start(self.title, self.start, self.text)
        check_placement(self.title, self.placement)

    @property
    def virtual_tokens(self) -> int:
        """The prompt occupies `length` positions."""
        return self.length

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The one delta, on the input embedding."""
        column = prompt_column(model, self.placement)
        return [PromptDelta(self.length, place.shape[1], column) for place in places]

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Set the rows by `start`."""
        for delta in deltas:
            assert isinstance(delta, PromptDelta)
            if self.start == "random":
                delta.rows.normal_(std=embedding_size(model))
            else:
                tokens = starting_tokens(self.title, model, self.start, self.text, self.length, tokenizer)
                delta.rows.copy_(input_embedding(model)(tokens))


class PromptDelta(Delta):
    """A soft prompt; `rows` is (length, hidden size), and `column` where it stands in the text."""

    def __init__(self, length: int, width: int, column: int) -> None:
        super().__init__()
        self.virtual_tokens = length
        self.column = column
        self.rows = nn.Parameter(torch.zeros(length, width))

    def forward(self, embedding: nn.Module) -> Tensor:
        """(length, hidden size)."""
        return self.rows


def prompt_column(model: PreTrainedModel, placement: str) -> int:
    """The column of the text at which a prompt begins: 0, or 1 after the first token."""
    return int(placement == "after-first" or (placement == "auto" and not is_causal(model)))


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The rows of the input embedding, (vocabulary, hidden size)."""
    table = input_embedding(model).weight
    assert isinstance(table, Tensor)
    return table


def embedding_size(model: PreTrainedModel) -> float:
    """The root mean square of what the input embedding gives, some models' own scaling included."""
    count = embedding_table(model).shape[0]
    tokens = torch.arange(0, count, max(1, count // 1000), device=model.device)
    rows: Tensor = input_embedding(model)(tokens)
    return float(rows.float().pow(2).mean().sqrt())


def starting_tokens(
    title: str,
    model: PreTrainedModel,
    start: str,
    text: str | None,
    length: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor:
    """The ids (length,) of the real tokens that a technique starts from.

    Raises:
        ValueError: a text needs a tokenizer, or has no token.
    """
    table = embedding_table(model)
    if start == "vocabulary":
        return torch.randint(table.shape[0], (length,), device=table.device)
    if tokenizer is None:
        raise ValueError(
            f"{title} starts from a text and needs the tokenizer: attach(model, ..., tokenizer=tokenizer)."
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{title}'s text={text!r} has no token to start from.")
    return torch.tensor((ids * length)[:length], device=table.device)


def check_start(title: str, start: str, text: str | None) -> None:
    """Raise a ValueError unless `start` is known, and a text is given exactly when it is used."""
    if start not in STARTS:
        raise ValueError(f"{title}'s start must be one of {', '.join(STARTS)}, got {start!r}.")
    if (start == "text") != (text is not None):
        raise ValueError(
            f"{title}'s text goes with start='text' and only with it; got start={start!r} and text={text!r}."
        )


def check_placement(title: str, placement: str) -> None:
    """Raise a ValueError unless `placement` is known."""
    if placement not in PLACEMENTS:
        raise ValueError(f"{title}'s placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}.")
