"""Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., 2022, arXiv:2110.04366.

The mix-and-match adapter (section 4.6): prefix tuning with a short prefix in every attention, whose few numbers suffice
there, and a scaled parallel adapter beside every feed-forward network, where more pay. Where we differ: the prefix is
trained itself, from the keys and values of real tokens, and not through an MLP; and the bottleneck is 64 wide, where
the paper's translation models have 512.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Delta, Method
from smidgen.methods.hybrid import Hybrid
from smidgen.methods.parallel import Parallel
from smidgen.methods.prefix_tuning import PrefixDelta, PrefixTuning
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAM(Hybrid):
    """Learns a short prefix in every attention and a bottleneck beside every feed-forward network.

    Args:
        length: how many virtual tokens; each takes a position from the text; 30 in the paper.
        size: the bottleneck's width.
        scale: multiplies what the bottleneck adds; 4 in the paper.
        dropout: probability of dropping a number of the bottleneck while training.
        start: "vocabulary", the keys and values of sampled tokens, or "random", as for a model that reads no text.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
    """

    name = "mam"
    title = "MAM adapter"
    paper = "arXiv:2110.04366"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 5e-4}

    length: int = 30
    size: int = 64
    scale: float = 4.0
    dropout: float = 0.0
    start: str = "vocabulary"
    layers: str = "all"

    @property
    def parts(self) -> tuple[Method, ...]:
        """The prefix and the parallel adapter."""
        return (
            PrefixTuning(length=self.length, start=self.start, layers=self.layers),
            Parallel(size=self.size, scale=self.scale, dropout=self.dropout, layers=self.layers),
        )

    def part(self, place: Place) -> int:
        """The prefix has the attentions."""
        return 0 if place.site == "attention" else 1

    def build(self, place: Place) -> Delta:
        """A prefix or a bottleneck."""
        return PrefixDelta(self.length, *place.shape) if place.site == "attention" else self.parts[1].build(place)
