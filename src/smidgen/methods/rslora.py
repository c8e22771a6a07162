"""A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023, arXiv:2312.03732.

LoRA's update scaled by alpha / sqrt(rank) instead of alpha / rank: the only power of the rank at which neither the
update nor its gradient shrinks or grows with it (theorem 3.2), so that a higher rank learns more instead of less.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from smidgen.delta import Method
from smidgen.methods.low_rank import LowRankDelta, check_low_rank, check_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsLoRA(Method):
    """Learns a low-rank update of each targeted weight: W + (alpha / √rank) B A.

    Args:
        rank: r, the update's rank; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / √rank (equation 4).
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, `alpha` is not above 0, or `dropout` is outside [0, 1).
    """

    name = "rslora"
    title = "rsLoRA"
    paper = "arXiv:2312.03732"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 3e-4}

    rank: int = 32
    alpha: float = 11.3
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)

    def resized(self, option: str, size: int) -> dict[str, Any]:
        """The options with another rank; alpha stays, which is what the scale by its root is for."""
        return {option: size}

    def build(self, place: Place) -> LowRankDelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return LowRankDelta(*place.shape, rank=self.rank, scale=self.alpha / math.sqrt(self.rank), dropout=self.dropout)
