"""Dropout of deltas: PyTorch's, with a byte a number kept for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.delta import dropped


def test_it_drops_its_share_and_scales_the_rest() -> None:
    inputs = torch.randn(200, 100, requires_grad=True)
    output = dropped(inputs, 0.25, True)
    kept = output != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    torch.testing.assert_close(output[kept], inputs[kept] / 0.75)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, kept / 0.75)


def test_a_byte_is_kept_of_each_number() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dropped(torch.randn(8, 16, requires_grad=True), 0.5, True)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept] == [(torch.bool, (8, 16))]


def test_nothing_is_dropped_in_evaluation_nor_by_a_probability_of_0() -> None:
    inputs = torch.randn(4)
    assert dropped(inputs, 0.5, False) is inputs
    assert dropped(inputs, 0.0, True) is inputs
