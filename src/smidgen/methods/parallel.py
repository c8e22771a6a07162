"""Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., 2022, arXiv:2110.04366.

The scaled parallel adapter: beside the feed-forward network, not after it, with the same input (sections 4.3 to 4.5):
FFN(x) + s · up(relu(down(x))). `up` starts at zero, as LoRA's B does, so that training starts from the
base model. With scale 1 it is the paper's plain parallel adapter.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Method
from smidgen.methods.bottleneck import BottleneckDelta, check_bottleneck, check_sublayers
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    """Learns a bottleneck beside a sublayer: sublayer(x) + scale · up(nonlinearity(down(x))).

    Args:
        size: the bottleneck's width; at least 1.
        scale: s, multiplies what is added (section 4.5).
        nonlinearity: relu, gelu, silu or tanh.
        dropout: probability of dropping a number of the bottleneck while training.
        targets: which sublayers: "feed-forward-sublayer", "attention-sublayer" or "sublayers".
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
    """

    name = "parallel"
    title = "Parallel adapter"
    paper = "arXiv:2110.04366"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 2e-4}

    size: int = 64
    scale: float = 4.0
    nonlinearity: str = "relu"
    dropout: float = 0.0
    targets: str = "feed-forward-sublayer"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_bottleneck(
            self.title, size=self.size, scale=self.scale, nonlinearity=self.nonlinearity, dropout=self.dropout
        )
        check_sublayers(self.title, self.targets)

    def build(self, place: Place) -> BottleneckDelta:
        """The delta beside one sublayer."""
        return BottleneckDelta(
            place.shape[1],
            size=self.size,
            scale=self.scale,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout,
            parallel=True,
        )
