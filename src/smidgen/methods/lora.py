"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021, arXiv:2106.09685.

A targeted layer's output W x becomes W x + (alpha / rank) B A x (section 4.1, equation 3). A is random and B zero, so
that training starts from the base model. Where we differ: the paper adapts the attention's query and value weights;
we adapt every linear layer of every block, which later work and our sweeps found better at the same size.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Method
from smidgen.methods.low_rank import LowRankDelta, check_low_rank, check_rank
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
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)

    def build(self, place: Place) -> LowRankDelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return LowRankDelta(*place.shape, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)
