"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021, arXiv:2106.09685.

A targeted layer's output W x becomes W x + (alpha / rank) B A x (section 4.1, equation 3). A is random and B zero, so
that training starts from the base model. Where we differ: the paper adapts the attention's query and value weights;
we adapt every linear layer of every block, which later work and our sweeps found better at the same size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, check_positive, check_share
from smidgen.layers import add_to_weight
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Learns a low-rank update of each targeted weight: W + (alpha / rank) B A.

    Args:
        rank: r, the update's rank; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / rank (section 4.1).
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, `alpha` is not above 0, or `dropout` is outside [0, 1).
    """

    name = "lora"
    title = "LoRA"
    paper = "arXiv:2106.09685"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 3e-4}

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "rank", self.rank)
        check_positive(self.title, "alpha", float(self.alpha))
        check_share(self.title, "dropout", self.dropout)
        if self.targets == "blocks" or "sublayer" in self.targets:
            raise ValueError(
                f"{self.title}'s targets must be linear layers, such as all-linear, attention or feed-forward, got "
                f"{self.targets!r}."
            )

    def build(self, place: Place) -> LoRADelta:
        """The delta for one linear layer."""
        if self.rank > min(place.shape):
            raise ValueError(
                f"LoRA's rank {self.rank} is above the size of {place.name}, {min(place.shape)}. Lower it."
            )
        return LoRADelta(*place.shape, self)


class LoRADelta(Delta):
    """The update of one layer; `a` is (rank, in) and `b` is (out, rank)."""

    def __init__(self, in_features: int, out_features: int, method: LoRA) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(method.rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, method.rank))  # zero: training starts from the base model
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as the authors' code; the paper says Gaussian
        self.scale = method.alpha / method.rank
        self.dropout = method.dropout

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Inputs: one (..., in); output and result: (..., out)."""
        x = inputs[0]
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        low = functional.linear(x, cast(self.a, x))
        flat = torch.addmm(  # one pass over the output instead of product, scale and sum
            output.reshape(-1, output.shape[-1]), low.reshape(-1, low.shape[-1]), cast(self.b, x).T, alpha=self.scale
        )
        return flat.view(output.shape)

    def merge(self, layer: nn.Module) -> None:
        """W += (alpha / rank) B A, in fp32."""
        add_to_weight(layer, self.scale * (self.b.float() @ self.a.float()))
