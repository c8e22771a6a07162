"""Full fine-tuning, the baseline in the same form: every parameter of the model is trained, and no delta is added."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Method
from smidgen.own import check_unquantized, own_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Trains all of the model's own parameters.

    Args:
        keep_base: whether to keep the original weights, so that the adapter can be disabled and detached; it costs the
            memory of a second copy.
    """

    name = "full"
    title = "Full fine-tuning"
    paper = "the baseline"
    learning_rates: ClassVar = {"encoder": 1e-4, "decoder": 3e-5}

    keep_base: bool = False

    @property
    def keeps_base(self) -> bool:
        """Whether the original weights are kept."""
        return self.keep_base

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """All of them."""
        check_unquantized(self.title, model)
        return [name for name, _ in own_parameters(model)]
