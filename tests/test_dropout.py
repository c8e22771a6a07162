"""Dropout of deltas: PyTorch's, with a byte a number kept for the backward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from smidgen import METHODS, attach
from smidgen.delta import dropped
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb


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


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if hasattr(kind, "dropout")])
def test_every_technique_that_has_it_drops_in_training_alone(name: str) -> None:
    method, batch, found = example(name, "bert"), make_batch("bert"), []
    for chance in (0.5, 0.0):
        model = build("bert")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(7)
        adapter = attach(model, dataclasses.replace(method, dropout=chance))
        disturb(adapter)
        own = []
        for training, seed in ((True, 0), (True, 0), (True, 1), (False, 0)):
            model.train(training)
            torch.manual_seed(seed)
            with torch.no_grad():
                own.append(model(**batch).logits)
        found.append(own)
    (first, again, other, served), (plain, *_, expected) = found
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    torch.testing.assert_close(served, expected)
    torch.testing.assert_close(plain, expected)


def test_nothing_is_dropped_in_evaluation_nor_by_a_probability_of_0() -> None:
    inputs = torch.randn(4)
    assert dropped(inputs, 0.5, False) is inputs
    assert dropped(inputs, 0.0, True) is inputs
