"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning.

Zhang et al., 2023, arXiv:2308.03303.

LoRA whose A stays as it was drawn, and whose B alone is trained (section 3.1). The backward pass then needs A x, which
has `rank` numbers a token, and not the layer's input x (section 3.2): autograd keeps nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Method
from smidgen.methods.low_rank import LowRankDelta, check_low_rank, check_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(Method):
    """Learns B of LoRA's update (alpha / rank) B A, with A fixed.

    Args:
        rank: r, the update's rank; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / rank.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, or `alpha` is not above 0.
    """

    name = "lora-fa"
    title = "LoRA-FA"
    paper = "arXiv:2308.03303"
    learning_rates: ClassVar = {"encoder": 3e-3, "decoder": 1e-3}

    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=0.0, targets=self.targets)

    def build(self, place: Place) -> LowRankDelta:
        """The delta for one linear layer; dropout would have to keep its mask of x, so there is none."""
        check_rank(self.title, self.rank, place)
        return LowRankDelta(*place.shape, rank=self.rank, scale=self.alpha / self.rank, learn_a=False)
