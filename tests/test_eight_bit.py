"""Frozen layers in 8 bits: the products and gradients of the rounded weight, in a quarter of the memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen import METHODS, LoRA, attach, load
from smidgen.eight_bit import EightBitLinear, to_eight_bits
from smidgen.errors import UserError
from smidgen.process.job import Job
from smidgen.process.opening import prepare, reopen
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb
from tests.process.tiny import save_recipe

TRAINS_WEIGHTS = {"full", "progressive", "pissa", "dora"}


def rounded(layer: EightBitLinear) -> nn.Linear:
    """A plain layer with the weight that the 8-bit one stands for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight.data = layer.weight.float() * layer.scale[:, None]
    plain.bias = layer.bias
    return plain.requires_grad_(False)


def with_rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain layers in the place of its 8-bit ones."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, EightBitLinear):
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, rounded(module))
    return plain


def eight_bit(name: str) -> PreTrainedModel:
    model = build(name)
    to_eight_bits(model)
    return model


@given(st.integers(1, 20), st.integers(1, 20), st.integers(-6, 6), st.integers(0, 99))
def test_no_weight_is_off_by_more_than_half_a_step(inside: int, outside: int, power: int, seed: int) -> None:
    layer = nn.Linear(inside, outside)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(outside, inside, generator=generator) * 10.0**power
    made = EightBitLinear(layer)
    off = (rounded(made).weight - layer.weight).abs()
    assert bool((off <= 0.5001 * made.scale[:, None]).all())
    assert made.weight.abs().max() == 127


def test_a_row_of_zeros_stays_so() -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data[0] = 0
    assert not rounded(EightBitLinear(layer)).weight[0].any()


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_the_rounded_weight_s(bias: bool) -> None:
    made = EightBitLinear(nn.Linear(6, 4, bias=bias).requires_grad_(False).double())
    inputs = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(made(inputs), rounded(made).double()(inputs), atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(made, (inputs,))


def test_no_unrounded_weight_is_kept_for_the_backward_pass() -> None:
    made, kept = EightBitLinear(nn.Linear(64, 64).requires_grad_(False)), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made(torch.randn(2, 64, requires_grad=True))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 64 * 64 + 64 * 4


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_model_with_an_adapter_learns_as_with_the_rounded_weights(architecture: str) -> None:
    model, batch = eight_bit(architecture), make_batch(architecture)
    found = []
    for own in (model, with_rounded(model)):
        adapter = attach(own, LoRA())
        torch.manual_seed(0)
        disturb(adapter)
        for name, parameter in adapter.named_parameters():
            if name.endswith(".a"):
                parameter.data.normal_()
        loss = own(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in adapter.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "adapter-fusion"])
def test_every_technique_works_on_it_or_says_why_not(name: str) -> None:
    model, batch = eight_bit("bert"), make_batch("bert")
    if name in TRAINS_WEIGHTS:
        with pytest.raises(ValueError, match="quantized"):
            attach(model, example(name, "bert"))
        return
    adapter = attach(model, example(name, "bert"))
    disturb(adapter)
    model(**batch).loss.backward()
    learned = [parameter for _, _, delta in adapter.entries() for parameter in delta.parameters()]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in learned)


def test_the_counts_are_those_of_the_unrounded_model() -> None:
    for method in (LoRA(), METHODS["houlsby"]()):
        whole, rounded = (attach(model, method) for model in (build("bert"), eight_bit("bert")))
        assert (whole.total, whole.trainable) == (rounded.total, rounded.trainable)


def test_its_adapter_fits_the_unrounded_model_too(tmp_path: Path) -> None:
    adapter = attach(eight_bit("bert"), LoRA())
    disturb(adapter)
    adapter.save(tmp_path / "lora")
    for model in (eight_bit("bert"), build("bert")):
        assert all(
            torch.equal(tensor, adapter.state()[name])
            for name, tensor in load(model, tmp_path / "lora").state().items()
        )
    with pytest.raises(ValueError, match="is quantized"):
        adapter.merge()


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no Linear layers in blocks"):
        to_eight_bits(build("gpt2"))


def job(folder: Path, *changes: str) -> Job:
    return prepare(load_recipe(save_recipe(folder), ["training.precision=int8", "training.epochs=2", *changes]))


def test_a_run_says_how_far_off_it_is_and_is_opened_again(tmp_path: Path) -> None:
    started = job(tmp_path, "technique=lora", "output=out")
    assert started.rounding is not None
    assert 1e-5 < started.rounding < 0.02
    metrics = run(started, quiet=True)
    assert any(note.startswith("8-bit weights put the model's last states off by 0.") for note in metrics["notes"])
    again = reopen(tmp_path / "out")
    assert again.evaluate()["loss"] == pytest.approx(metrics["test"]["loss"], rel=1e-6)
    assert reopen(tmp_path / "out", precision="fp32").adapter.merge() is not None


def test_what_trains_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"technique=full: Full fine-tuning trains the model's weights, and bert\.enc"):
        job(tmp_path, "technique=full")
