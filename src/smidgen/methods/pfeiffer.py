"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., 2021, arXiv:2005.00247.

One bottleneck a block instead of Houlsby's two, after the feed-forward network's residual and norm (found by search
over where adapters and norms go): h + up(relu(down(h))), with h a block's output. In pre-norm models the block ends
at its residual, and that is where the adapter sits. Where we differ: in post-norm models the authors' library applies
the block's norm a second time after the adapter; here the block stays as it is.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Method, check_positive
from smidgen.methods.bottleneck import BottleneckDelta, check_bottleneck, reduced
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """Learns one bottleneck after every block: h + up(nonlinearity(down(h))).

    Args:
        reduction: the hidden size over the bottleneck's width; 16 in the paper.
        nonlinearity: relu, gelu, silu or tanh.
        dropout: probability of dropping a number of the bottleneck while training.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
    """

    name = "pfeiffer"
    title = "Pfeiffer adapter"
    paper = "arXiv:2005.00247"
    targets = "blocks"
    learning_rates: ClassVar = {"encoder": 3e-3, "decoder": 2e-4}

    reduction: int = 16
    nonlinearity: str = "relu"
    dropout: float = 0.0
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "reduction", self.reduction)
        check_bottleneck(self.title, size=1, scale=1.0, nonlinearity=self.nonlinearity, dropout=self.dropout)

    def build(self, place: Place) -> BottleneckDelta:
        """The delta at the end of one block; its start is near the identity."""
        return BottleneckDelta(
            place.shape[1],
            size=reduced(place.shape[1], self.reduction),
            scale=1.0,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout,
            deviation=1e-2,
        )
