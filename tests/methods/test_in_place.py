"""Updates take the place of a layer's output where nothing else has seen it, and nowhere else."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen import attach, rows
from smidgen.layers import in_place, output_is_ours
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb

UPDATES = ("lora", "rslora", "pissa", "miss", "adalora", "vera", "unipelt", "mam")


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_hook_that_saw_the_output_before_keeps_what_it_saw(name: str, architecture: str) -> None:
    model, batch = build(architecture), make_batch(architecture)
    kept: list[tuple[nn.Linear, Tensor, Tensor]] = []
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        layer.register_forward_hook(lambda layer, inputs, output: kept.append((layer, inputs[0], output)))
    disturb(attach(model, example(name, architecture)))
    kept.clear()
    with torch.no_grad():
        model(**batch)
    assert kept
    for layer, inputs, output in kept:
        assert torch.equal(output, functional.linear(inputs, layer.weight, layer.bias))


@pytest.mark.parametrize("name", UPDATES)
def test_in_place_or_not_the_answer_and_the_gradients_are_the_same(name: str) -> None:
    found = []
    for watched in (False, True):
        model, batch = build("bert"), make_batch("bert")
        torch.manual_seed(0)
        adapter = attach(model, example(name, "bert"))
        disturb(adapter)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and hasattr(module, "deltas")]
        assert all(map(output_is_ours, layers))
        for layer in layers if watched else ():
            layer.register_forward_hook(lambda *_: None)
        assert not any(map(output_is_ours, layers if watched else ()))
        model(**batch).loss.backward()
        found.append([p.grad for p in adapter.parameters() if p.grad is not None])
        model.zero_grad()
        with torch.no_grad(), rows(model, ["default", None, "default", None]):
            found[-1].append(model(**batch).logits)
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_a_change_in_place_copies_no_gradient(name: str, by_row: bool) -> None:
    """As it would of what autograd knows as a view."""
    model, batch = build("bert"), make_batch("bert")
    attach(model, example("lora", "bert"), name="other")
    attach(model, example(name, "bert"), name="one")
    with rows(model, ["one", "other", None, "one"]) if by_row else contextlib.nullcontext():
        steps, seen = [model(**batch).loss.grad_fn], set()
    while steps:
        step = steps.pop()
        if step not in seen:
            seen.add(step)
            steps += [earlier for earlier, _ in step.next_functions if earlier is not None]
    assert len(seen) > 100
    assert not [step for step in seen if "CopySlices" in step.name()]


def test_what_another_technique_needs_for_its_gradient_is_not_changed_in_silence() -> None:
    states = torch.tanh(torch.randn(2, 4, requires_grad=True))  # as a delta before it may give them
    changed = in_place(states, -1, 4).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()
