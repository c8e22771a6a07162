"""What a technique may ask of a layer, whatever its class: its features, and its weight as a matrix."""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer maps (..., in) to (..., out) by a weight: Linear, GPT-2's Conv1D, and their quantized kin."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer) or _duck_linear(layer)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D, a linear layer whose weight is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _duck_linear(layer: nn.Module) -> bool:
    features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return all(isinstance(feature, int) for feature in features)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer.

    Raises:
        TypeError: the layer is not linear.
    """
    if is_conv1d(layer) and isinstance(layer.weight, Tensor):
        inside, outside = layer.weight.shape
        return int(inside), int(outside)
    if is_linear(layer):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    raise TypeError(f"{type(layer).__name__} is not a linear layer.")


def as_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the layout of the layer's own weight."""
    return matrix.T if is_conv1d(layer) else matrix


def is_causal(model: nn.Module) -> bool:
    """Whether the model's attention looks back only, as a decoder's does."""
    return any(getattr(layer, "is_causal", False) is True for layer in model.modules())
