"""Parameter-Efficient Transfer Learning for NLP. Houlsby et al., 2019, arXiv:1902.00751.

A bottleneck with a residual after each attention and each feed-forward network, on the sublayer's output before it
joins the residual stream (figure 2): h + up(gelu(down(h))). The layer norms are trained as well (section 2.1). Where
we differ: in models with dropout on the sublayer's output the paper's adapter comes after that dropout, ours before
it, so that it can be put on any architecture; at inference the two are the same.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Method
from smidgen.methods.bottleneck import BottleneckDelta, check_bottleneck, check_sublayers
from smidgen.targets import Place, norm_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """Learns a bottleneck after every sublayer: h + up(nonlinearity(down(h))).

    Args:
        size: m, the bottleneck's width (section 2.1); at least 1.
        nonlinearity: relu, gelu, silu or tanh.
        dropout: probability of dropping a number of the bottleneck while training.
        norms: whether the norms inside the chosen blocks are trained too, as in the paper.
        targets: which sublayers: "sublayers", "attention-sublayer" or "feed-forward-sublayer".
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
    """

    name = "houlsby"
    title = "Houlsby adapter"
    paper = "arXiv:1902.00751"
    learning_rates: ClassVar = {"encoder": 2e-3, "decoder": 3e-4}

    size: int = 64
    nonlinearity: str = "gelu"
    dropout: float = 0.0
    norms: bool = True
    targets: str = "sublayers"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_bottleneck(self.title, size=self.size, scale=1.0, nonlinearity=self.nonlinearity, dropout=self.dropout)
        check_sublayers(self.title, self.targets)

    def build(self, place: Place) -> BottleneckDelta:
        """The delta at the end of one sublayer; its start is near the identity, deviation 1e-2 (section 3.6)."""
        return BottleneckDelta(
            place.shape[1],
            size=self.size,
            scale=1.0,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout,
            deviation=1e-2,
        )

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The norms inside the chosen blocks."""
        return norm_parameters(model, self.layers, inside_only=True) if self.norms else []
