"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., 2024, arXiv:2402.09353.

The weight is taken apart into a direction and, for each output, a magnitude; LoRA updates the direction, and the
magnitudes m are trained themselves: m (W + s B A) / ‖W + s B A‖ (section 4.1, equation 5), with the norm of each row of
the (out, in) weight. The norm is held constant in the backward pass (section 4.3), which changes the gradient little
and saves memory. Where we differ: m starts as the norm in fp32 whatever the model's format; dropout drops inputs of the
update alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, without_autocast
from smidgen.layers import set_weight, weight_matrix
from smidgen.methods.low_rank import LowRankDelta, check_low_rank, check_rank
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """Learns magnitude and direction of each targeted weight: m · (W + s B A) / ‖W + s B A‖, s = alpha / rank.

    Args:
        rank: r, the update's rank; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / rank.
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, `alpha` is not above 0, `dropout` is outside [0, 1), or a
        weight is quantized.
    """

    name = "dora"
    title = "DoRA"
    paper = "arXiv:2402.09353"
    needs_plain_output = True
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 3e-4}

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)

    def build(self, place: Place) -> DoRADelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return DoRADelta(*place.shape, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """The magnitude is that of the frozen weight, so that training starts from the base model."""
        for place, delta in zip(places, deltas, strict=True):
            assert isinstance(delta, DoRADelta)
            delta.magnitude.copy_(weight_matrix(place.layer).float().norm(dim=1))


class DoRADelta(Delta):
    """One layer's direction, `direction.a` (rank, in) and `direction.b` (out, rank), and `magnitude` (out,)."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.direction = LowRankDelta(in_features, out_features, rank=rank, scale=scale, dropout=dropout)
        self.magnitude = nn.Parameter(torch.ones(out_features))

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output W x + bias, and the result: (..., out)."""
        ratio = self.magnitude / self._norm(layer)  # fp32: in bfloat16 one that is nearly 1 would be 1
        bias = getattr(layer, "bias", None)
        bias = bias if isinstance(bias, Tensor) else torch.zeros_like(ratio)
        direction = self.direction(layer, inputs, hidden - cast(bias, hidden))
        return torch.addcmul(cast(bias, ratio), ratio, direction).to(hidden.dtype)

    @torch.no_grad()
    def _norm(self, layer: nn.Module) -> Tensor:
        """‖W + s B A‖ of each row, (out,), expanded so that the sum is never built: W Aᵀ has `rank` columns only."""
        a, b, scale = self.direction.a.float(), self.direction.b.float(), self.direction.scale
        weight = weight_matrix(layer).float()
        with without_autocast(a):
            cross = (functional.linear(weight, a) * b).sum(1)
            square = (functional.linear(b, a @ a.T) * b).sum(1)
        return (weight.square().sum(1) + 2 * scale * cross + scale**2 * square).clamp_min(1e-12).sqrt()

    def merge(self, layer: nn.Module) -> None:
        """W becomes m · (W + s B A) / ‖W + s B A‖, in fp32."""
        weight = weight_matrix(layer).float() + self.direction.update()
        norm = weight.square().sum(1).clamp_min(1e-12).sqrt()
        set_weight(layer, (self.magnitude.float() / norm)[:, None] * weight)
