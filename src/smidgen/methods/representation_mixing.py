"""Representation mixing, a reading of LoRA in guides to fine-tuning; it has no paper of its own.

A full-rank matrix M mixes what the frozen model represents, and a learned gate g says how much of the mixture takes the
representation's place: h' = (1 - g) h + g M h, at the end of each block. M starts as the identity, so that training
starts from the base model whatever the gate is; g, one number a block, is a sigmoid's value and starts at a half.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationMixing(Method):
    """Learns a full-rank mixer of every block's output, and a gate: (1 - g) h + g M h.

    Args:
        layers: which blocks: "all", "last:4", "0-3", "0,5".
    """

    name = "representation-mixing"
    title = "Representation mixing"
    paper = "no paper"
    targets = "blocks"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 3e-4}

    layers: str = "all"

    def build(self, place: Place) -> MixingDelta:
        """The mixer at the end of one block."""
        return MixingDelta(place.shape[1])


class MixingDelta(Delta):
    """One block's mixer; `mixer` is M, (width, width), and `gate_logit` (1,) the gate before its sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.eye(width))
        self.gate_logit = nn.Parameter(torch.zeros(1))

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the block's output, and the result: (..., width)."""
        change = self.gate_value() * (self.mixer - torch.eye(len(self.mixer), device=self.mixer.device))
        return hidden + functional.linear(hidden, cast(change, hidden)).to(hidden.dtype)  # h + g (M - I) h

    def gate_value(self) -> Tensor:
        """g, (1,): 0 leaves the representation as it is, 1 puts the mixture in its place."""
        return torch.sigmoid(self.gate_logit)
