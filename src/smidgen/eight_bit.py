"""Frozen linear layers in 8 bits: a quarter of the memory of fp32, for a base model that only its adapter changes.

Each output's weights are whole numbers from -127 to 127 and one scale (LLM.int8(), Dettmers et al., 2022,
arXiv:2208.07339, section 2.1, of weights alone); products are in the number format of the inputs. For the backward pass
the 8-bit numbers are kept and not, as by torchao 0.18, the weights made of them, which would take as much as fp32's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.own import own_modules
from smidgen.storage import sampled
from smidgen.targets import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 127


class EightBitLinear(nn.Module):
    """A frozen linear layer whose weight is `scale` (out,) times `weight`, int8 (out, in).

    Args:
        layer: whose place it takes.

    Attributes:
        original: what the base model's fingerprint needs of the weight before it was rounded, so that the adapter fits
            the unrounded model as well.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        rows = layer.weight.detach()
        scale = rows.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        self.register_buffer("weight", (rows / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = layer.bias
        self.original = sampled(layer.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product: Tensor = _Product.apply(inputs, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """Inputs times the weight; its gradient is computed of 8-bit numbers again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(inputs, weight.to(inputs.dtype)) * scale.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


def to_eight_bits(model: PreTrainedModel) -> None:
    """Round the weights of all linear layers in the model's blocks to 8 bits; embeddings and heads stay as they are.

    Raises:
        ValueError: there are none.
    """
    found = [
        (parent, child, layer)
        for stack in blocks(model)
        for name in stack
        for _, parent in own_modules(model.get_submodule(name))
        for child, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Linear layers in blocks, whose weights could be in 8 bits.")
    made = {layer: EightBitLinear(layer) for _, _, layer in found}  # one that has several places is one still
    for parent, child, layer in found:
        setattr(parent, child, made[layer])
