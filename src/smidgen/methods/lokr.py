"""Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation.

Yeh et al., 2024, arXiv:2309.14859.

LoKr: the update is a Kronecker product C ⊗ (B A) of a small full matrix and a low-rank one (section 3.2, equation 4).
The product is never built to compute with: x is read as a matrix, to which the two factors are applied from two sides.
`factor` is a side of C, or, where it does not divide the layer's, the largest divisor below it; when it is None, the
divisor nearest to the square root. Where the rank is at least half of the second factor's larger side, that factor is
full as well. Where we differ: C starts at zero and the second factor at random, so that training starts from the base
model; in LyCORIS it is the other way round.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.delta import Delta, Method, cast, check_positive
from smidgen.methods.low_rank import check_low_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """Learns a Kronecker product as the update of each targeted weight: W + (alpha / rank) C ⊗ (B A).

    Args:
        rank: r, of the second factor; at least 1.
        alpha: scales the update by alpha / rank.
        factor: the sides of C, or None: near the square root of the layer's.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` or `factor` is below 1, or `alpha` is not above 0.
    """

    name = "lokr"
    title = "LoKr"
    paper = "arXiv:2309.14859"
    learning_rates: ClassVar = {"encoder": 9e-3, "decoder": 2e-3}

    rank: int = 8
    alpha: float = 8.0
    factor: int | None = None
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=0.0, targets=self.targets)
        if self.factor is not None:
            check_positive(self.title, "factor", self.factor)

    def build(self, place: Place) -> LoKrDelta:
        """The delta for one linear layer."""
        (in_small, in_large), (out_small, out_large) = (divided(side, self.factor) for side in place.shape)
        rank = self.rank if self.rank < max(in_large, out_large) / 2 else None
        return LoKrDelta((out_small, in_small), (out_large, in_large), rank=rank, scale=self.alpha / self.rank)


def divided(side: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is `side`: `factor`, or the largest divisor up to it and the square root; the other.

    >>> divided(384, None), divided(384, 8), divided(127, None)
    ((16, 24), (8, 48), (1, 127))
    """
    if factor is not None and side % factor == 0:
        return factor, side // factor
    limit = min(factor or side, math.isqrt(side))
    small = next(number for number in range(limit, 0, -1) if side % number == 0)
    return small, side // small


class LoKrDelta(Delta):
    """One layer's update C ⊗ D; `c` is (out small, in small), D = B A or, with no rank, `d` (out large, in large)."""

    def __init__(self, small: tuple[int, int], large: tuple[int, int], *, rank: int | None, scale: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(small))  # zero: training starts from the base model
        self.rank = rank
        if rank is None:
            self.d = nn.Parameter(torch.empty(large))
            nn.init.kaiming_uniform_(self.d, a=math.sqrt(5))
        else:
            self.a, self.b = nn.Parameter(torch.empty(rank, large[1])), nn.Parameter(torch.empty(large[0], rank))
            for factor in (self.a, self.b):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.scale = scale

    def second(self) -> Tensor:
        """D, (out large, in large)."""
        return self.d if self.rank is None else self.b @ self.a

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x: Tensor = inputs[0]
        c, d = cast(self.c, x), cast(self.scale * self.second(), x)
        matrix = x.unflatten(-1, (c.shape[1], d.shape[1]))
        product: Tensor = c @ (matrix @ d.T)  # (C ⊗ D) vec(X) = vec(C X Dᵀ)
        return hidden + product.flatten(-2)

    def update(self) -> Tensor:
        """Scale · C ⊗ D, (out, in), in fp32."""
        update: Tensor = torch.kron(self.c.float(), self.scale * self.second().float())
        return update
