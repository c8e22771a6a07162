"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Ben Zaken et al., 2022, arXiv:2106.10199.

The model's own bias vectors are trained, those of its norms included, and nothing else (section 3). No parameter is
added. Models without biases (Llama and its kin) are refused: there is nothing to train.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Method
from smidgen.own import head_names
from smidgen.targets import own_parameters_inside

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains the model's own biases.

    Args:
        layers: which blocks: "last:4", "0-3", "0,5"; "all" also takes the biases outside the blocks.

    Raises:
        ValueError: the model has no biases, or `layers` names a block that is not there.
    """

    name = "bitfit"
    title = "BitFit"
    paper = "arXiv:2106.10199"
    learning_rates: ClassVar = {"encoder": 3e-3, "decoder": 1e-3}

    layers: str = "all"

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The biases."""
        inside = own_parameters_inside(model, self.layers)
        names = [name for name in inside if name.rpartition(".")[2] == "bias"]
        if not set(names) - set(head_names(model)):
            raise ValueError(
                f"{type(model).__name__} has no biases in layers={self.layers!r}, so that {self.title} would train "
                "nothing. Norm tuning or (IA)³ are as small and work on it."
            )
        return names
