"""PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models.

Meng et al., 2024, arXiv:2404.02948.

LoRA's form started from the weight itself: A and B are the `rank` largest singular values and vectors of W, and what is
left of W stays frozen (section 3, equations 2 to 4). So the principal directions are trained and not noise. Where we
differ: the base weight is not changed; the start A0, B0 is kept beside A and B, and W + B A - B0 A0 is computed, which
is the paper's own way to share an adapter for the original model (section 3, appendix C), with twice the rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, dropped
from smidgen.layers import weight_matrix
from smidgen.methods.low_rank import add_product, check_low_rank, check_rank
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(Method):
    """Learns the principal part of each targeted weight: W - B0 A0 + B A, with B0 A0 its best approximation.

    Args:
        rank: r, how many singular values and vectors are trained; from 1 to the layer's smaller side.
        dropout: probability of dropping an input of B A - B0 A0 while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, `dropout` is outside [0, 1), or a weight is quantized.
    """

    name = "pissa"
    title = "PiSSA"
    paper = "arXiv:2404.02948"
    learning_rates: ClassVar = {"encoder": 9e-4, "decoder": 5e-5}

    rank: int = 8
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=1.0, dropout=self.dropout, targets=self.targets)

    def build(self, place: Place) -> PiSSADelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return PiSSADelta(*place.shape, rank=self.rank, dropout=self.dropout)

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Take the largest singular values, their square roots to each side (equations 2 and 3)."""
        for place, delta in zip(places, deltas, strict=True):
            assert isinstance(delta, PiSSADelta)
            left, values, right = torch.linalg.svd(weight_matrix(place.layer).float(), full_matrices=False)
            roots = values[: self.rank].sqrt()
            for a in (delta.a, delta.start_a):
                a.copy_(roots[:, None] * right[: self.rank])
            for b in (delta.b, delta.start_b):
                b.copy_(left[:, : self.rank] * roots)


class PiSSADelta(Delta):
    """W x + B A x - B0 A0 x; `a` is (rank, in), `b` is (out, rank), and `start_a`, `start_b` are where they began."""

    start_a: Tensor
    start_b: Tensor

    def __init__(self, in_features: int, out_features: int, *, rank: int, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.register_buffer("start_a", torch.zeros(rank, in_features))
        self.register_buffer("start_b", torch.zeros(out_features, rank))
        self.dropout = dropout

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x = inputs[0]
        x = dropped(x, self.dropout, self.training)
        low = functional.linear(x, cast(torch.cat([self.a, self.start_a]), x))
        return add_product(layer, hidden, low, cast(torch.cat([self.b, -self.start_b], dim=1), x), 1.0)

    def update(self) -> Tensor:
        """B A - B0 A0, (out, in), in fp32."""
        return self.b.float() @ self.a.float() - self.start_b.float() @ self.start_a.float()

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Twice the rank: what is trained, less where it began."""
        return torch.cat([self.a, self.start_a]), torch.cat([self.b, -self.start_b], dim=1), 1.0
