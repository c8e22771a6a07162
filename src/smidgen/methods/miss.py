"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure.

Kang and Yin, 2024, arXiv:2409.15371.

The update is one trained matrix D, (rank, out), shared by all shards of the input: the input is cut into pieces of
`rank` numbers, the pieces are summed, and D maps the sum (section 4.2). It has out · rank numbers and no second
factor. D starts at zero, so that training starts from the base model. Where `rank` does not divide the input, the last
piece is filled with zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, dropped
from smidgen.methods.low_rank import add_product, check_low_rank, check_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """Learns one matrix a layer that every shard of the input shares: W x + Dᵀ Σ shards(x).

    Args:
        rank: r, the numbers in a shard; from 1 to the layer's smaller side.
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, or `dropout` is outside [0, 1).
    """

    name = "miss"
    title = "MiSS"
    paper = "arXiv:2409.15371"
    learning_rates: ClassVar = {"encoder": 3.3e-4, "decoder": 3e-4}

    rank: int = 16
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=1.0, dropout=self.dropout, targets=self.targets)

    def build(self, place: Place) -> MiSSDelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return MiSSDelta(*place.shape, rank=self.rank, dropout=self.dropout)


class MiSSDelta(Delta):
    """One layer's matrix; `d` is (rank, out)."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, dropout: float) -> None:
        super().__init__()
        self.in_features, self.rank, self.dropout = in_features, rank, dropout
        self.d = nn.Parameter(torch.zeros(rank, out_features))  # zero: training starts from the base model

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x = inputs[0]
        x = dropped(x, self.dropout, self.training)
        shards = functional.pad(x, (0, -x.shape[-1] % self.rank)).unflatten(-1, (-1, self.rank))
        return add_product(layer, hidden, shards.sum(-2), cast(self.d.T, x), 1.0)

    def update(self) -> Tensor:
        """Dᵀ repeated over the shards, (out, in), in fp32."""
        return self.d.float().T.repeat(1, -(-self.in_features // self.rank))[:, : self.in_features]
