"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang, 2021, arXiv:2101.00190.

Every attention gets learned keys and values before those of the text, at positions that the text's own follow. Either
they are trained themselves, from the keys and values of real tokens, the start that the paper found best with little
data (section 7.4); or, with `hidden_size`, through the paper's reparameterization P = MLP(P') with a smaller P'
(section 4.3), of which P alone is saved. Where we differ: the paper has both at once; here it is one or the other,
since real tokens' keys and values are not the result of an MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from smidgen import attention
from smidgen.delta import Delta, Method, check_positive
from smidgen.methods.prompt_tuning import check_start, starting_tokens
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Learns keys and values that every token may attend to, at every layer.

    Args:
        length: how many virtual tokens; each takes a position from the text.
        hidden_size: width of the reparameterizing MLP's hidden layer (section 4.3; 512 in the paper), or None to train
            the keys and values themselves.
        start: "random", "vocabulary" or "text": real tokens' keys and values to start from, without the MLP.
        text: the text to start from, repeated or cut to `length` tokens.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range, or `start` does not go with the other fields.
    """

    name = "prefix-tuning"
    title = "Prefix tuning"
    paper = "arXiv:2101.00190"
    site = "attention"
    learning_rates: ClassVar = {"encoder": 2.7e-2, "decoder": 5e-3}

    length: int = 16
    hidden_size: int | None = None
    start: str = "vocabulary"
    text: str | None = None
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)
        check_start(self.title, self.start, self.text)
        if self.hidden_size is not None:
            check_positive(self.title, "hidden_size", self.hidden_size)
            if self.start != "random":
                raise ValueError(
                    f"{self.title}'s start={self.start!r} sets keys and values themselves, and "
                    f"hidden_size={self.hidden_size} makes them by an MLP. Use start='random' with the MLP, or "
                    "hidden_size=None without it."
                )

    @property
    def virtual_tokens(self) -> int:
        """The prefix occupies `length` positions."""
        return self.length

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas for all attentions; with an MLP, they share its input and its hidden layer."""
        if self.hidden_size is None:
            return [PrefixDelta(self.length, *place.shape) for place in places]
        width = model.config.get_text_config().hidden_size
        trunk = PrefixTrunk(self.length, width, self.hidden_size)
        return [ReparameterizedPrefixDelta(trunk, self.hidden_size, *place.shape) for place in places]

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Start from the keys and values that the model gives real tokens."""
        if self.start == "random":
            return
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"{self.title} starts from the keys and values of real tokens, and {type(model).__name__} reads "
                f"{model.main_input_name}. Use start='random', as P-tuning v2 does."
            )
        tokens = starting_tokens(self.title, model, self.start, self.text, self.length, tokenizer)
        inputs = attention.text_inputs(model, tokens[None])
        seen = {layer: (keys, values) for layer, keys, values in attention.watch(model, inputs)}
        for place, delta in zip(places, deltas, strict=True):
            assert isinstance(delta, PrefixDelta)
            keys, values = seen[place.layer]
            delta.keys_values.copy_(torch.stack([keys[0], values[0]]).transpose(1, 2))

    def folded(self, deltas: Sequence[Delta]) -> PrefixTuning:
        """Without the MLP: its result is what is kept."""
        return dataclasses.replace(self, hidden_size=None, start="random", text=None)


class PrefixDelta(Delta):
    """One layer's prefix; `keys_values` is (2, length, key-value heads, head size)."""

    def __init__(self, length: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.virtual_tokens = length
        self.keys_values = nn.Parameter(torch.randn(2, length, heads, head_size) * 0.02)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, heads, length, head size)."""
        keys, values = self.keys_values.transpose(1, 2)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)


class PrefixTrunk(nn.Module):
    """What all layers share of the MLP: P' (length, width), and its hidden layer."""

    def __init__(self, length: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.hidden = nn.Linear(width, hidden_size)

    def forward(self) -> Tensor:
        """(length, hidden size of the MLP)."""
        return torch.tanh(self.hidden(self.embedding))


class ReparameterizedPrefixDelta(Delta):
    """One layer's prefix while it is trained: its own slice of the MLP's last layer on the shared trunk."""

    def __init__(self, trunk: PrefixTrunk, hidden_size: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.virtual_tokens = trunk.length
        self.trunk = trunk
        self.out = nn.Linear(hidden_size, 2 * heads * head_size)
        self.shape = (trunk.length, 2, heads, head_size)

    def keys_values(self) -> Tensor:
        """(2, length, heads, head size)."""
        result: Tensor = self.out(self.trunk())
        return result.view(self.shape).transpose(0, 1)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, heads, length, head size)."""
        keys, values = self.keys_values().transpose(1, 2)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def folded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The keys and values that the MLP gives now."""
        with torch.no_grad():
            return {"keys_values": self.keys_values()}
