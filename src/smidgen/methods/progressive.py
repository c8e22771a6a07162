"""Universal Language Model Fine-tuning for Text Classification. Howard and Ruder, 2018, arXiv:1801.06146.

Progressive fine-tuning: the head, the last blocks and, unless told otherwise, the embeddings are trained first; then
one block after another joins, from the top down, so that what the lower ones know is not disturbed by a head that has
learned nothing yet (gradual unfreezing, section 3.3). A lower block can learn more slowly: at `decay` 2.6 each has the
rate of the one above it divided by 2.6 (discriminative fine-tuning, section 3.2). Guides to fine-tuning call this
P-tuning.

It works on the model's own weights or, beside other techniques, on what those train: [LoRA(),
Progressive(weights=False)]. It alone says what is trained at each step; what a user froze by hand is trained again.
Where we differ: blocks join at even distances over `until` of the steps, where the paper's join one an epoch; and the
embeddings come first, as the guides have it, or last, as in the paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Delta, Method, check_positive
from smidgen.own import check_unquantized
from smidgen.targets import blocks, choose_blocks, own_parameters_inside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter

EMBEDDINGS = ("first", "last", "never")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    """Trains the model from the top down, one block after another joining.

    Args:
        start: how many of the last blocks are trained from the beginning.
        until: the share of the steps after which all blocks are trained.
        embeddings: when what stands before the blocks is trained: "first", "last" (after all blocks) or "never".
        decay: the learning rate of a block over that of the block below it.
        weights: whether the model's own weights are trained, or only what other techniques of the adapter train.
        keep_base: whether to keep the original weights, as for full fine-tuning.
        layers: which blocks are trained at most: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range.
        RuntimeError: at the first step, if nothing says how many steps there will be.
    """

    name = "progressive"
    title = "Progressive fine-tuning"
    paper = "arXiv:1801.06146"
    learning_rates: ClassVar = {"encoder": 1e-4, "decoder": 3e-5}

    start: int = 1
    until: float = 0.5
    embeddings: str = "first"
    decay: float = 1.0
    weights: bool = True
    keep_base: bool = False
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "start", self.start)
        if not 0 < self.until <= 1:
            raise ValueError(f"{self.title}'s until must be above 0 and at most 1, got {self.until}.")
        if not 1 <= self.decay < math.inf:
            raise ValueError(f"{self.title}'s decay must be at least 1, got {self.decay}.")
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(
                f"{self.title}'s embeddings must be one of {', '.join(EMBEDDINGS)}, got {self.embeddings!r}."
            )

    @property
    def keeps_base(self) -> bool:
        """Whether the original weights are kept; where none are trained, they are."""
        return self.keep_base or not self.weights

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The weights of the blocks that may join, of what stands above them and, unless never, below."""
        depths = Depths(model, self.layers)  # before all else, so that wrong layers are refused in time
        if not self.weights:
            return []
        check_unquantized(self.title, model)
        return [
            name
            for name in own_parameters_inside(model, "all")
            if depths.of(name) <= depths.count or (depths.is_below(name) and self.embeddings != "never")
        ]

    def rate_ratio(self, model: PreTrainedModel, parameter: str) -> float:
        """Divided by `decay` once for each block above the parameter's."""
        return 1.0 if self.decay == 1 else self.decay ** -Depths(model, self.layers).of(parameter)

    def schedule(self, adapter: Adapter, deltas: Sequence[Delta]) -> None:
        """Let the parameters of the blocks that have joined be trained, and no others."""
        done = adapter.clock.share(self.title) if adapter.clock.step else 0.0
        depths = Depths(adapter.model, self.layers)
        joined = self.joined(done, depths.count)
        with_embeddings = self.embeddings == "first" or (self.embeddings == "last" and joined == depths.count)
        for name, parameter in adapter.named_parameters():
            trained = with_embeddings if depths.is_below(name) else depths.of(name) <= joined
            parameter.requires_grad_(trained)

    def joined(self, done: float, count: int) -> int:
        """How many of `count` blocks are trained after a share of the steps."""
        waiting = max(0, count - self.start)
        return count - waiting + min(waiting, int(waiting * done / self.until + 1e-9))


class Depths:
    """How far below the head each parameter is: 0 above the blocks, 1 in the last one that may join, and so on down.

    What stands before the blocks, as embeddings do, is one deeper than the lowest; so are blocks that never join.

    Attributes:
        count: how many blocks may join, of the longest stack.
    """

    def __init__(self, model: PreTrainedModel, layers: str = "all") -> None:
        chosen = set(choose_blocks(model, layers))
        stacks = [[name for name in stack if name in chosen] for stack in blocks(model)]
        self.count = max(map(len, stacks))
        self._depth = {f"{name}.": depth for stack in stacks for depth, name in enumerate(reversed(stack), start=1)}
        every = tuple(f"{name}." for stack in blocks(model) for name in stack)
        self._never = tuple(block for block in every if block not in self._depth)
        names = own_parameters_inside(model, "all")
        first = next(at for at, name in enumerate(names) if name.startswith(every))
        modules = {f"{name.rpartition('.')[0]}." for name in names[:first]}
        inside = tuple(module for module in modules if not any(block.startswith(module) for block in every))
        self._below = (*inside, *(name for name in names[:first] if not name.startswith(inside)))

    def is_below(self, name: str) -> bool:
        """Whether the parameter stands before the blocks."""
        return name.startswith(self._below)

    def of(self, name: str) -> int:
        """The depth of a parameter, the model's own or a delta's."""
        if self.is_below(name) or name.startswith(self._never):
            return self.count + 1
        return next((depth for block, depth in self._depth.items() if name.startswith(block)), 0)
