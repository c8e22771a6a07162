"""MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer. Pfeiffer et al., 2020, arXiv:2005.00052.

Invertible adapters: a coupling layer after the embeddings, and its inverse before the output embedding where the model
predicts tokens, so that a language's vocabulary is adapted at both ends by the same parameters (section 4.3). One half
of the vector is changed by a function of the other, in turns, which can be undone exactly. It goes with adapters in the
blocks: attach(model, [Pfeiffer(), Invertible()]). Where we differ: the functions' last layer starts at zero, so that
training starts from the base model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen import targets
from smidgen.delta import Delta, Method, check_positive
from smidgen.methods.bottleneck import BottleneckDelta, check_bottleneck, reduced
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invertible(Method):
    """Learns a coupling layer after the embeddings, undone before the output embedding: x1 + F(x2), x2 + G(y1).

    Args:
        reduction: half the hidden size over the width of F and G; 2 in the paper.
        nonlinearity: relu, gelu, silu or tanh.

    Raises:
        ValueError: a value is outside its range, the hidden size is odd, or that of the embeddings is another.
    """

    name = "invertible"
    title = "Invertible adapter"
    paper = "arXiv:2005.00052"
    learning_rates: ClassVar = {"encoder": 2.7e-3, "decoder": 1e-4}

    reduction: int = 2
    nonlinearity: str = "relu"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "reduction", self.reduction)
        check_bottleneck(self.title, size=1, scale=1.0, nonlinearity=self.nonlinearity, dropout=0.0)

    def places(self, model: PreTrainedModel) -> list[Place]:
        """The input of each stack's first block, and that of the output embedding."""
        return targets.ends(model)

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The coupling layer, shared by both ends."""
        width = places[0].shape[0]
        if other := next((place for place in places if place.shape[0] != width), None):
            raise ValueError(
                f"{self.title} is undone where it began, and {places[0].name} has {width} numbers, {other.name} "
                f"{other.shape[0]}."
            )
        if width % 2:
            raise ValueError(f"{self.title} halves the hidden size, and {width} is odd.")
        coupling = Coupling(width // 2, self)
        blocks = {name for stack in targets.blocks(model) for name in stack}
        return [CouplingDelta(coupling, inverse=place.name not in blocks) for place in places]


class Coupling(nn.Module):
    """F and G, each a bottleneck on half the vector."""

    def __init__(self, half: int, method: Invertible) -> None:
        super().__init__()
        size = reduced(half, method.reduction)
        self.f, self.g = (
            BottleneckDelta(half, size=size, scale=1.0, nonlinearity=method.nonlinearity, dropout=0.0) for _ in range(2)
        )

    def forward(self, x: Tensor, inverse: bool) -> Tensor:
        """X and result: (..., width)."""
        first, second = x.chunk(2, dim=-1)
        if inverse:
            second = second - self.g.added(first)
            first = first - self.f.added(second)
        else:
            first = first + self.f.added(second)
            second = second + self.g.added(first)
        return torch.cat([first, second], dim=-1)


class CouplingDelta(Delta):
    """One end: the coupling layer, or its inverse."""

    def __init__(self, coupling: Coupling, *, inverse: bool) -> None:
        super().__init__()
        self.coupling, self.inverse = coupling, inverse

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's input, and the result: (..., width)."""
        result: Tensor = self.coupling(hidden, self.inverse)
        return result
