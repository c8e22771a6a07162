"""What the low-rank techniques share: the update scale · B A of a layer's weight, and the checks of its options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, cast, check_positive, check_share, dropped
from smidgen.layers import in_place, output_is_ours
from smidgen.targets import Place, check_linear


def check_low_rank(title: str, *, rank: int, alpha: float, dropout: float, targets: str) -> None:
    """Raise a ValueError that names the field unless all are sensible."""
    check_positive(title, "rank", rank)
    check_positive(title, "alpha", float(alpha))
    check_share(title, "dropout", dropout)
    check_linear(title, targets)


def check_rank(title: str, rank: int, place: Place) -> None:
    """Raise a ValueError if a rank is above the smaller side of a layer."""
    if rank > min(place.shape):
        raise ValueError(f"{title}'s rank {rank} is above the size of {place.name}, {min(place.shape)}. Lower it.")


class LowRankDelta(Delta):
    """W x + scale · B A x; `a` is (rank, in) and `b` is (out, rank).

    Args:
        in_features: of the layer.
        out_features: of the layer.
        rank: of the update.
        scale: multiplies the update.
        dropout: probability of dropping an input of the update while training.
        learn_a: whether `a` is trained, or stays as it was drawn.
    """

    a: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        learn_a: bool = True,
    ) -> None:
        super().__init__()
        a = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as LoRA's authors' code; the paper says Gaussian
        if learn_a:
            self.a = nn.Parameter(a)
        else:
            self.register_buffer("a", a)
        self.b = nn.Parameter(torch.zeros(out_features, rank))  # zero: training starts from the base model
        self.scale = scale
        self.dropout = dropout

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x = inputs[0]
        x = dropped(x, self.dropout, self.training)
        return add_product(layer, hidden, functional.linear(x, cast(self.a, x)), cast(self.b, x), self.scale)

    def joins(self) -> bool:
        """Whether no input of the update is dropped."""
        return not (self.dropout and self.training)

    def update(self) -> Tensor:
        """Scale · B A, (out, in), in fp32."""
        return self.scale * (self.b.float() @ self.a.float())

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale."""
        return self.a, self.b, self.scale


def add_product(layer: nn.Module, hidden: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """Hidden (..., out) + scale · low (..., rank) bᵀ, in one pass over the output instead of product, scale and sum.

    The sum takes the place of `hidden`, a layer's output, where nothing else has seen it.
    """
    low, b = cast(low, hidden), cast(b, hidden)  # autocast does so for addmm, and not for addmm_
    add = in_place(hidden, -1, hidden.shape[-1]).addmm_ if output_is_ours(layer) else hidden.flatten(0, -2).addmm
    return add(low.flatten(0, -2), b.T, alpha=scale).view(hidden.shape)
