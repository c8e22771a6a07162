"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning. Mao et al., 2022, arXiv:2110.07577.

LoRA, a prefix and a Pfeiffer adapter in every block, each multiplied by a gate that is learned with it, so that the
model picks what suits the data (section 3.2): σ(w · x + b), of what goes into the submodule. Where we differ: the paper
averages a gate over a text's tokens; here every token has its own, since an average would change with the padding and
let a decoder see what comes later. The prefix's gate reads the queries, and multiplies what a softmax of the prefix
alone gives, as LLaMA-Adapter's does: then the prefix takes no positions from the text. LoRA is on all of the
attention's linear layers, where the paper has query and value.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast
from smidgen.layers import is_linear
from smidgen.methods.hybrid import Hybrid
from smidgen.methods.lora import LoRA
from smidgen.methods.pfeiffer import Pfeiffer
from smidgen.methods.prefix_tuning import PrefixDelta, PrefixTuning
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPELT(Hybrid):
    """Learns LoRA, a prefix and a bottleneck in every block, and how much of each every token gets.

    Args:
        rank: of LoRA's updates.
        alpha: scales them by alpha / rank.
        length: how many keys and values the prefix has; 10 in the paper.
        reduction: the hidden size over the bottleneck's width; 16 in the paper.
        targets: which linear layers have LoRA, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
    """

    name = "unipelt"
    title = "UniPELT"
    paper = "arXiv:2110.07577"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 5e-4}

    rank: int = 8
    alpha: float = 16.0
    length: int = 10
    reduction: int = 16
    targets: str = "attention"
    layers: str = "all"

    @property
    def parts(self) -> tuple[Method, ...]:
        """LoRA, the prefix and the adapter."""
        return (
            LoRA(rank=self.rank, alpha=self.alpha, targets=self.targets, layers=self.layers),
            PrefixTuning(length=self.length, start="random", layers=self.layers),
            Pfeiffer(reduction=self.reduction, layers=self.layers),
        )

    def part(self, place: Place) -> int:
        """The prefix has the attentions, LoRA the linear layers, the adapter the blocks."""
        return 1 if place.site == "attention" else 0 if is_linear(place.layer) else 2

    @property
    def virtual_tokens(self) -> int:
        """A prefix with a softmax of its own takes no positions."""
        return 0

    def build(self, place: Place) -> Delta:
        """The part's delta with its gate."""
        if place.site == "attention":
            return QueryGatedPrefixDelta(self.length, *place.shape)
        inner = self.parts[self.part(place)].build(place)
        return GatedDelta(inner, place.shape[0], of_input=is_linear(place.layer))


class Gate(nn.Module):
    """σ(w · x + b), one number a token: it starts near a half.

    Args:
        width: of x.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def at_zero(self) -> Tensor:
        """What it gives for a token of zeros, (1,)."""
        return self.bias.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., 1)."""
        return functional.linear(x, cast(self.weight, x), cast(self.bias, x)).sigmoid()


class GatedDelta(Delta):
    """h + g(x) (inner(h) − h): what another delta changes, as much of it as the gate lets through.

    Args:
        inner: the other.
        width: of x.
        of_input: whether x is what goes into the layer, instead of h, which comes out of it.
    """

    def __init__(self, inner: Delta, width: int, *, of_input: bool) -> None:
        super().__init__()
        self.inner = inner
        self.gate = Gate(width)
        self.of_input = of_input

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's output, and the result: (..., out); inputs, if they are read: one (..., width)."""
        gate: Tensor = self.gate(inputs[0] if self.of_input else hidden)
        changed: Tensor = self.inner(layer, inputs, hidden.clone())  # which it may change in place
        return hidden + gate.to(hidden.dtype) * (changed - hidden)

    def gate_value(self) -> Tensor:
        """The gate for a token of zeros, (1,)."""
        return self.gate.at_zero


class QueryGatedPrefixDelta(PrefixDelta):
    """One layer's prefix and its gate, which reads a token's queries; where heads share keys, their mean."""

    def __init__(self, length: int, heads: int, head_size: int) -> None:
        super().__init__(length, heads, head_size)
        self.virtual_tokens = 0  # it has an attention of its own
        self.gate = Gate(heads * head_size)

    def gated(self, query: Tensor) -> Tensor:
        """The gate of every token: (batch, heads, queries, head size) to (batch, queries, 1, 1)."""
        heads = self.keys_values.shape[2]
        token = query.unflatten(1, (heads, -1)).mean(2).transpose(1, 2).flatten(2)
        gate: Tensor = self.gate(token)
        return gate[..., None]

    def gate_value(self) -> Tensor:
        """The gate for a token of zeros, (1,)."""
        return self.gate.at_zero
