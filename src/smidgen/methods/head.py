"""Head only, the other baseline: the frozen model as it is, and a new task head."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Method
from smidgen.own import head_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Trains the task head, and nothing else."""

    name = "head"
    title = "Head only"
    paper = "the baseline"
    learning_rates: ClassVar = {"encoder": 6e-3, "decoder": 1e-3}
    head_learning_rate = None  # it is all there is

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The head's parameters.

        Raises:
            ValueError: the model has no task head to train.
        """
        names = head_names(model)
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no task head, so that head-only training would train nothing."
            )
        return names
