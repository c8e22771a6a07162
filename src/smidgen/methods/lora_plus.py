"""LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al., 2024, arXiv:2402.12354.

LoRA whose B learns faster than A: at the same rate for both, a wide model's features are not learned efficiently
(section 3); a fixed ratio between the two rates, well above one, mends it (section 4). The ratio reaches the optimizer
through `parameter_groups`, and a step without it is an error. Where we differ: the embedding has no rate of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Delta, Method, check_positive
from smidgen.methods.low_rank import LowRankDelta, check_low_rank, check_rank
from smidgen.targets import Place

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPlus(Method):
    """Learns LoRA's update with a higher learning rate for B than for A.

    Args:
        rank: r, the update's rank; from 1 to the layer's smaller side.
        alpha: scales the update by alpha / rank.
        ratio: λ, B's learning rate over A's.
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above a layer's size, `alpha` or `ratio` is not above 0, or `dropout` is not in
        [0, 1).
    """

    name = "lora-plus"
    title = "LoRA+"
    paper = "arXiv:2402.12354"
    learning_rates: ClassVar = {"encoder": 2e-4, "decoder": 1e-4}

    rank: int = 8
    alpha: float = 16.0
    ratio: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)
        check_positive(self.title, "ratio", float(self.ratio))

    def build(self, place: Place) -> LowRankDelta:
        """The delta for one linear layer."""
        check_rank(self.title, self.rank, place)
        return LowRankDelta(*place.shape, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)

    def rate_ratio(self, model: PreTrainedModel, parameter: str) -> float:
        """`ratio` for B, 1 for A."""
        return self.ratio if parameter.endswith(f".{self.name}.b") else 1.0

    def before_step(self, adapter: Adapter, deltas: Sequence[Delta], optimizer: Optimizer) -> None:
        """Raise a RuntimeError unless the optimizer has B learn `ratio` times as fast as A."""
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        a, b = (rates.get(id(parameter)) for parameter in (deltas[0].a, deltas[0].b))
        if a is None and b is None:
            return  # it trains something else of the adapter
        if a is None or b is None or not math.isclose(b, a * self.ratio, rel_tol=1e-4):
            raise RuntimeError(
                f"{self.title}'s B must learn {self.ratio:g} times as fast as A, and the optimizer has the rates {b} "
                f"and {a}. Give it parameter_groups(adapter, learning_rate) instead of adapter.parameters()."
            )
