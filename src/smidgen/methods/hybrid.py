"""What techniques made of others share: each place belongs to one part, which builds its delta there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smidgen.delta import Delta, Method
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(Method):
    """Several techniques, published as one."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """The techniques."""
        raise NotImplementedError

    def part(self, place: Place) -> int:
        """Which of `parts` has its delta at this place."""
        raise NotImplementedError

    def check(self) -> None:
        """Let each part check its own fields."""
        for part in self.parts:
            part.check()

    @property
    def virtual_tokens(self) -> int:
        """What all parts take from the text."""
        return sum(part.virtual_tokens for part in self.parts)

    def places(self, model: PreTrainedModel) -> list[Place]:
        """Those of all parts."""
        return [place for part in self.parts for place in part.places(model)]

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Let each part set its starting values."""
        for number, part in enumerate(self.parts):
            own = [index for index, place in enumerate(places) if self.part(place) == number]
            part.initialize(model, [places[index] for index in own], [deltas[index] for index in own], tokenizer)
