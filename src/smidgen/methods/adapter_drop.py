"""AdapterDrop: On the Efficiency of Adapters in Transformers. Rücklé et al., 2021, arXiv:2010.11918.

Bottlenecks at the end of the blocks, as Pfeiffer's, without those of the first blocks: nothing is trained below the
first that is left, and a batch for several tasks shares what is computed there (section 3). Which number is left out
may differ from step to step: robust training draws it anew for each, so that one adapter serves with any number left
out; specialized training leaves the same out at all times. Where we differ: the draw goes up to `drop` and not to all
blocks, and the first step leaves none out, so that every bottleneck is seen to learn.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from smidgen import targets
from smidgen.delta import Delta, Method, check_positive
from smidgen.methods.bottleneck import check_bottleneck
from smidgen.methods.pfeiffer import Pfeiffer
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterDrop(Method):
    """Learns bottlenecks after the blocks, of which the first can be left out.

    Args:
        drop: how many of the first bottlenecks are left out at inference, and at most while training.
        robust: whether training draws the number left out at each step, from 0 to `drop`; otherwise the first `drop`
            blocks have no bottleneck at all.
        reduction: the hidden size over the bottleneck's width.
        nonlinearity: relu, gelu, silu or tanh.
        dropout: probability of dropping a number of the bottleneck while training.

    Raises:
        ValueError: a value is outside its range, or `drop` leaves no bottleneck.
    """

    name = "adapter-drop"
    title = "AdapterDrop"
    paper = "arXiv:2010.11918"
    learning_rates: ClassVar = {"encoder": 3e-3, "decoder": 2e-4}

    drop: int = 2
    robust: bool = True
    reduction: int = 16
    nonlinearity: str = "relu"
    dropout: float = 0.0

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "reduction", self.reduction)
        check_bottleneck(self.title, size=1, scale=1.0, nonlinearity=self.nonlinearity, dropout=self.dropout)
        if self.drop < 0:
            raise ValueError(f"{self.title}'s drop must be at least 0, got {self.drop}.")

    def places(self, model: PreTrainedModel) -> list[Place]:
        """The blocks; unless `robust`, without the first ones."""
        count = min(map(len, targets.blocks(model)), default=0)
        if self.drop >= count:
            raise ValueError(f"{self.title}'s drop={self.drop} leaves none of the {count} bottlenecks. Lower it.")
        left_out = set() if self.robust else {name for stack in targets.blocks(model) for name in stack[: self.drop]}
        return [place for place in targets.find(model, "blocks") if place.name not in left_out]

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas of all blocks, which know together how many are left out."""
        left_out = LeftOut(serving=self.drop if self.robust else 0, training=0)
        index = {name: index for stack in targets.blocks(model) for index, name in enumerate(stack)}
        return [DroppableDelta(index[place.name], left_out, self, place) for place in places]

    def schedule(self, adapter: Adapter, deltas: Sequence[Delta]) -> None:
        """Draw how many are left out at the next training step; the same in every run and process."""
        step = adapter.clock.step
        first = deltas[0]  # all have the same
        assert isinstance(first, DroppableDelta)
        first.left_out.training = random.Random(step).randint(0, self.drop) if self.robust and step else 0


@dataclasses.dataclass
class LeftOut:
    """How many of the first bottlenecks are left out, shared by all of them."""

    serving: int
    training: int


class DroppableDelta(Delta):
    """One block's bottleneck, and its number among them."""

    def __init__(self, index: int, left_out: LeftOut, method: AdapterDrop, place: Place) -> None:
        super().__init__()
        self.index, self.left_out = index, left_out
        pfeiffer = Pfeiffer(reduction=method.reduction, nonlinearity=method.nonlinearity, dropout=method.dropout)
        self.bottleneck = pfeiffer.build(place)

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the block's output, and the result: (..., width)."""
        if self.index < (self.left_out.training if self.training else self.left_out.serving):
            return hidden
        return self.bottleneck.forward(layer, inputs, hidden)
