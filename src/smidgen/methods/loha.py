"""FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning.

Hyeon-Woo et al., 2022, arXiv:2108.06098.

LoHa: the update is the elementwise product of two low-rank matrices, (B1 A1) ⊙ (B2 A2), whose rank can reach rank²
(proposition 1). As an update of a frozen weight it comes from LyCORIS (Yeh et al., 2024, arXiv:2309.14859), whose start
this has: B2 zero, the others Gaussian, B1 with deviation 0.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast
from smidgen.methods.low_rank import check_low_rank, check_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """Learns an elementwise product of two low-rank updates: W + (alpha / rank) (B1 A1) ⊙ (B2 A2).

    Args:
        rank: r, of each factor; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / rank.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, or `alpha` is not above 0.
    """

    name = "loha"
    title = "LoHa"
    paper = "arXiv:2108.06098"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 5e-4}

    rank: int = 8
    alpha: float = 8.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=0.0, targets=self.targets)

    def build(self, place: Place) -> LoHaDelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return LoHaDelta(*place.shape, rank=self.rank, scale=self.alpha / self.rank)


class LoHaDelta(Delta):
    """One layer's update; `a1` and `a2` are (rank, in), `b1` and `b2` (out, rank)."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.a1 = nn.Parameter(torch.randn(rank, in_features))
        self.a2 = nn.Parameter(torch.randn(rank, in_features))
        self.b1 = nn.Parameter(torch.randn(out_features, rank) * 0.1)
        self.b2 = nn.Parameter(torch.zeros(out_features, rank))  # zero: training starts from the base model
        self.scale = scale

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        return hidden + functional.linear(inputs[0], cast(self.update(), inputs[0]))

    def update(self) -> Tensor:
        """Scale · (B1 A1) ⊙ (B2 A2), (out, in), in fp32."""
        return self.scale * (self.b1.float() @ self.a1.float()) * (self.b2.float() @ self.a2.float())
