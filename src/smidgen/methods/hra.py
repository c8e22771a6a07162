"""Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation.

Yuan et al., 2024, arXiv:2405.17484.

HRA: each weight is multiplied by a chain of Householder reflections, W H1 ... Hr with Hi = I - 2 ui uiᵀ / ‖ui‖²
(section 3.1). Vectors come in equal pairs at the start, so that the chain is the identity. The chain is applied to the
layer's input at once: H1 ... Hr = I - V T Vᵀ, with V the unit vectors and T⁻¹ = I / 2 plus the part of Vᵀ V above its
diagonal. Where we differ: the paper's regularizer, which pulls the vectors apart, is left out (its λ = 0).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen import targets
from smidgen.delta import Delta, Method, cast, check_positive, without_autocast
from smidgen.layers import set_weight, weight_matrix
from smidgen.targets import Place, check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """Learns a chain of reflections of each targeted layer's input: W H1 ... Hr x.

    Args:
        rank: r, how many reflections; an even number, so that pairs cancel at the start.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 2 or odd.
    """

    name = "hra"
    title = "HRA"
    paper = "arXiv:2405.17484"
    learning_rates: ClassVar = {"encoder": 9e-3, "decoder": 3e-4}

    rank: int = 8
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "rank", self.rank)
        if self.rank % 2:
            raise ValueError(f"{self.title}'s rank must be even, so that pairs cancel at the start; got {self.rank}.")
        check_linear(self.title, self.targets)

    def places(self, model: PreTrainedModel) -> list[Place]:
        """The inputs of the layers."""
        return targets.inputs(model, self.targets, self.layers)

    def build(self, place: Place) -> HRADelta:
        """The reflections of one layer's input."""
        return HRADelta(place.shape[0], rank=self.rank)


class HRADelta(Delta):
    """One layer's reflections; `u` is (rank, in)."""

    def __init__(self, in_features: int, *, rank: int) -> None:
        super().__init__()
        half = torch.randn(rank // 2, in_features)
        self.u = nn.Parameter(half.repeat_interleave(2, dim=0))  # a reflection twice is the identity

    def chain(self) -> tuple[Tensor, Tensor]:
        """V (rank, in), its rows of length one, and T V, in fp32: H1 ... Hr = I - Vᵀ T V."""
        v = functional.normalize(self.u.float(), dim=1)
        identity = torch.eye(len(v), device=v.device)
        with without_autocast(v):
            return v, torch.linalg.solve_triangular(identity / 2 + (v @ v.T).triu(1), identity, upper=True) @ v

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's input, and the result: (..., in)."""
        v, tv = self.chain()
        low = functional.linear(hidden, cast(tv, hidden))
        return hidden - functional.linear(low, cast(v.T, hidden))

    def merge(self, layer: nn.Module) -> None:
        """W becomes W H1 ... Hr, in fp32."""
        weight, (v, tv) = weight_matrix(layer).float(), self.chain()
        set_weight(layer, weight - weight @ v.T @ tv)
