"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention.

Zhang et al., 2023, arXiv:2303.16199.

The top layers attend to a learned prompt beside the text, by a softmax of its own whose result is multiplied by a gate
that starts at zero (section 3.2), so that training starts from the base model and what the prompt says enters little by
little. The prompt takes no positions from the text. Where we differ: the prompt's keys and values are learned
themselves, not through the layer's frozen projections; the gate is one number a layer, where the paper has the tanh of
one a head; and every layer has a prompt unless `layers` says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from smidgen.delta import Method, check_positive
from smidgen.methods.prefix_tuning import PrefixDelta
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    """Learns a prompt that attention sees through a gate: attention + g · softmax(q kᵀ) v.

    Args:
        length: how many prompt tokens; 10 in the paper.
        layers: which blocks: "all", "last:4", "0-3", "0,5"; the paper's are the last 30 of 32.

    Raises:
        ValueError: `length` is below 1.
    """

    name = "llama-adapter"
    title = "LLaMA-Adapter"
    paper = "arXiv:2303.16199"
    site = "attention"
    learning_rates: ClassVar = {"encoder": 9e-3, "decoder": 9e-3}

    length: int = 10
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "length", self.length)

    def build(self, place: Place) -> GatedPrefixDelta:
        """The delta of one attention."""
        return GatedPrefixDelta(self.length, *place.shape)


class GatedPrefixDelta(PrefixDelta):
    """One layer's prompt, as a prefix has it, and its `gate` (1,)."""

    def __init__(self, length: int, heads: int, head_size: int) -> None:
        super().__init__(length, heads, head_size)
        self.virtual_tokens = 0  # it has an attention of its own
        self.gate = nn.Parameter(torch.zeros(1))  # zero: training starts from the base model

    def gated(self, query: Tensor) -> Tensor:
        """The layer's gate, (1,)."""
        return self.gate

    def gate_value(self) -> Tensor:
        """The layer's gate, (1,)."""
        return self.gate
