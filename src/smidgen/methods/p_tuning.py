"""GPT Understands, Too. Liu et al., 2021, arXiv:2103.10385.

P-tuning: a soft prompt whose rows are made by a small prompt encoder, an LSTM or an MLP, so that they depend on each
other (section 3.2); only its result is saved. Where we differ: the paper trains the model as well in part of its
experiments and puts virtual tokens between the words of a template; here the model is frozen and they stand together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from smidgen.delta import Delta, Method, check_positive
from smidgen.methods.prompt_tuning import PromptDelta, check_placement, embedding_size, prompt_column
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODERS = ("mlp", "lstm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Learns a soft prompt through a prompt encoder.

    Args:
        length: how many virtual tokens; each takes a position from the text.
        encoder: "mlp" or "lstm"; None once its result alone was saved.
        hidden_size: the encoder's width; None: the model's hidden size.
        placement: "first", "after-first" or "auto", as for prompt tuning.

    Raises:
        ValueError: a value is outside its range.
    """

    name = "p-tuning"
    title = "P-tuning"
    paper = "arXiv:2103.10385"
    site = "embedding"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 1e-3}

    length: int = 20
    encoder: str | None = "mlp"
    hidden_size: int | None = None
    placement: str = "auto"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)
        check_placement(self.title, self.placement)
        if self.hidden_size is not None:
            check_positive(self.title, "hidden_size", self.hidden_size)
        if self.encoder not in (*ENCODERS, None):
            raise ValueError(f"{self.title}'s encoder must be one of {', '.join(ENCODERS)}, got {self.encoder!r}.")

    @property
    def virtual_tokens(self) -> int:
        """The prompt occupies `length` positions."""
        return self.length

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The one delta, on the input embedding."""
        column = prompt_column(model, self.placement)
        if self.encoder is None:
            return [PromptDelta(self.length, place.shape[1], column) for place in places]
        return [EncodedPromptDelta(self, place.shape[1], column) for place in places]

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Scale the encoder's last layer so that its first rows have the size of the model's embedding rows."""
        if self.encoder is None:
            raise ValueError(
                "P-tuning with encoder=None is what a saved one holds. To train rows alone, use PromptTuning."
            )
        for place, delta in zip(places, deltas, strict=True):
            assert isinstance(delta, EncodedPromptDelta)
            ratio = embedding_size(model) / float(delta(place.layer).pow(2).mean().sqrt())
            for parameter in delta.head[-1].parameters():
                parameter.mul_(ratio)

    def folded(self, deltas: Sequence[Delta]) -> PTuning:
        """Without the encoder: its result is what is kept."""
        return dataclasses.replace(self, encoder=None)


class EncodedPromptDelta(Delta):
    """A soft prompt while it is trained: `embedding` (length, width) through the prompt encoder."""

    def __init__(self, method: PTuning, width: int, column: int) -> None:
        super().__init__()
        self.virtual_tokens = method.length
        self.column = column
        hidden = method.hidden_size or width
        self.embedding = nn.Parameter(torch.randn(method.length, width))
        self.lstm = None
        if method.encoder == "lstm":
            self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self, embedding: nn.Module) -> Tensor:
        """(length, hidden size)."""
        rows = self.embedding
        if self.lstm is not None:
            rows = self.lstm(rows[None])[0][0]
        encoded: Tensor = self.head(rows)
        return encoded

    def folded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The rows that the encoder gives now."""
        with torch.no_grad():
            return {"rows": self(layer)}
