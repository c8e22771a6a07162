"""Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning. Zhao et al., 2024, arXiv:2312.11420.

The model's own norms are trained, weights and biases, and nothing else. No parameter is added. Where we differ: the
paper also trains the part that joins vision and text, the word embedding and the output head; and all of a block's
norms are trained here, not only the one at its attention.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from smidgen.delta import Method
from smidgen.targets import norm_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Trains the model's own norms.

    Args:
        layers: which blocks: "last:4", "0-3", "0,5"; "all" also takes the norms outside the blocks.

    Raises:
        ValueError: the model's norms have no parameters, or `layers` names a block that is not there.
    """

    name = "norm-tuning"
    title = "Norm tuning"
    paper = "arXiv:2312.11420"
    learning_rates: ClassVar = {"encoder": 9e-3, "decoder": 3e-3}

    layers: str = "all"

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The norms' weights and biases."""
        names = norm_parameters(model, self.layers)
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no norm with parameters in layers={self.layers!r}, so that {self.title} "
                "would train nothing."
            )
        return names
