"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks.

Liu et al., 2022, arXiv:2110.07602.

Deep prompts: learned vectors at every layer, as keys and values that the text attends to (section 3.2), and the task's
head on top instead of words that stand for classes (section 3.3). They are trained themselves: a reparameterization
helps on some tasks only (section 3.3). Where it differs from prefix tuning here: random vectors to start from, and a
longer prompt.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from smidgen.delta import Method, check_positive
from smidgen.methods.prefix_tuning import PrefixDelta
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """Learns a deep prompt: keys and values at every layer.

    Args:
        length: how many virtual tokens; each takes a position from the text.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `length` is below 1.
    """

    name = "p-tuning-v2"
    title = "P-tuning v2"
    paper = "arXiv:2110.07602"
    site = "attention"
    learning_rates: ClassVar = {"encoder": 0.063, "decoder": 5e-3}

    length: int = 20
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)

    @property
    def virtual_tokens(self) -> int:
        """The prompt occupies `length` positions."""
        return self.length

    def build(self, place: Place) -> PrefixDelta:
        """The delta of one attention."""
        return PrefixDelta(self.length, *place.shape)
