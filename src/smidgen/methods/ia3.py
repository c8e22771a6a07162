"""Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

Liu et al., 2022, arXiv:2205.05638.

(IA)³: learned vectors scale keys, values and the inner activations of the feed-forward networks (section 3.3). All
start at one, so that training starts from the base model. The inner activations are what goes into a feed-forward
network's last layer, and are scaled there, whatever stands before it. Where we differ: a layer that makes queries, keys
and values at once (GPT-2, GPT-NeoX, Phi-3) is scaled as a whole, its queries too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen import targets
from smidgen.delta import Delta, Method
from smidgen.layers import set_weight, weight_matrix
from smidgen.targets import Place, check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learns vectors that scale keys, values and inner activations: l ⊙ k, l ⊙ v, W (l ⊙ x).

    Args:
        outputs: the linear layers whose output is scaled, as a role or a name pattern, or None.
        inputs: those whose input is scaled, or None.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: both `outputs` and `inputs` are None, or one is not of linear layers.
    """

    name = "ia3"
    title = "(IA)³"
    paper = "arXiv:2205.05638"
    learning_rates: ClassVar = {"encoder": 5e-3, "decoder": 3e-3}

    outputs: str | None = "keys-and-values"
    inputs: str | None = "feed-forward-out"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        if self.outputs is None and self.inputs is None:
            raise ValueError(f"{self.title} needs outputs or inputs to scale; both are None.")
        for wanted in filter(None, (self.outputs, self.inputs)):
            check_linear(self.title, wanted)

    def places(self, model: PreTrainedModel) -> list[Place]:
        """The layers whose output is scaled, then those whose input is."""
        return [
            *targets.find(model, self.outputs, self.layers),
            *targets.inputs(model, self.inputs, self.layers),
        ]

    def build(self, place: Place) -> IA3Delta:
        """The vector of one layer."""
        return IA3Delta(place)


class IA3Delta(Delta):
    """One layer's vector; `scale` is (out,), or (in,) where the input is scaled."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.of_input = place.side == "input"
        self.scale = nn.Parameter(torch.ones(place.shape[0 if self.of_input else 1]))

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's output or input, and the result: (..., width)."""
        return (hidden * self.scale.float()).to(hidden.dtype)  # in bfloat16 a scale that is nearly 1 would be 1

    def merge(self, layer: nn.Module) -> None:
        """Scale the weight's columns, or its rows and the bias, in fp32."""
        weight, scale = weight_matrix(layer).float(), self.scale.float()
        set_weight(layer, weight * scale if self.of_input else scale[:, None] * weight)
        bias = layer.bias
        if not self.of_input and isinstance(bias, Tensor):
            with torch.no_grad():
                bias.copy_(scale * bias.float())
