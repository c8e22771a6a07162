"""What every technique promises on every architecture."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smidgen import METHODS, Adapter, HardPrompt, Method, attach, load
from smidgen.rates import parameter_groups
from smidgen.targets import Place
from tests.conftest import build, example

Batch = dict[str, torch.Tensor]
NOT_MERGEABLE = {
    "houlsby",
    "pfeiffer",
    "parallel",
    "representation-mixing",
    "compacter",
    "adapter-drop",
    "invertible",
    "loreft",
    "prefix-tuning",
    "p-tuning-v2",
    "llama-adapter",
    "prompt-tuning",
    "p-tuning",
    "hard-prompt",
    "mam",
    "unipelt",
    "adapter-fusion",
}
NEAR_IDENTITY_AT_START = {"houlsby", "pfeiffer", "adapter-drop", "unipelt"}
SEEN_AT_START = {"prefix-tuning", "p-tuning-v2", "prompt-tuning", "p-tuning", "hard-prompt", "mam", "adapter-fusion"}


def logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.clone()


def disturb(adapter: Adapter) -> None:
    """Move everything that is trained away from its start."""
    generator = torch.Generator().manual_seed(7)
    far = any(isinstance(method, HardPrompt) for method in adapter.methods)  # to another token
    with torch.no_grad():
        for parameter in adapter.parameters():
            if far:
                parameter.copy_(2 * torch.randn(parameter.shape))
            else:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, architecture: str) -> Method:
    return example(request.param, architecture)


def test_starts_from_the_base_model(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    before = logits(model, batch)
    attach(model, method)
    if method.name in SEEN_AT_START:
        assert not torch.equal(logits(model, batch), before)  # virtual tokens are seen from the first step
    elif method.name in NEAR_IDENTITY_AT_START:
        torch.testing.assert_close(logits(model, batch), before, atol=0.05, rtol=0.05)
    else:
        torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=0)


def test_only_what_the_adapter_names_is_trained(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {id(parameter) for parameter in adapter.parameters()}
    adapter.clock.steps = 1
    optimizer = torch.optim.AdamW(parameter_groups(adapter, 0.1))
    model.train()
    model(**batch).loss.backward()
    adapter.check_gradients()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained)
        if id(parameter) not in trained:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if id(p) in trained)


def test_disabled_is_the_base_model_to_the_bit(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    if not method.keeps_base:
        method = dataclasses.replace(method, keep_base=True)
    before = logits(model, batch)
    adapter = attach(model, method)
    disturb(adapter)
    changed = logits(model, batch)
    with adapter.disabled():
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), changed)
    assert not torch.equal(changed, before)


def test_detach_restores_the_base_model(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    if not method.keeps_base:
        method = dataclasses.replace(method, keep_base=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    before = logits(model, batch)
    adapter = attach(model, method)
    disturb(adapter)
    assert adapter.detach() is model
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert torch.equal(logits(model, batch), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_saved_and_loaded_gives_the_same_logits(
    method: Method, model: PreTrainedModel, batch: Batch, architecture: str, tmp_path: Path
) -> None:
    adapter = attach(model, method, name="task.1")
    disturb(adapter)
    expected = logits(model, batch)
    adapter.save(tmp_path / "saved", metrics={"accuracy": 0.5})
    again = build(architecture)
    loaded = load(again, tmp_path / "saved")
    assert loaded.name == "task.1"
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-6, rtol=0)
    if method == method.folded(adapter.deltas[0]):
        assert torch.equal(logits(again, batch), expected)
    loaded.save(tmp_path / "again")
    files = [(tmp_path / folder / "adapter.safetensors").read_bytes() for folder in ("saved", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("name", "parameter", "factor"),
    [("dora", "magnitude", 1.003), ("ia3", "scale", 1.003), ("representation-mixing", "mixer", 1.006)],  # half is gated
)
def test_what_is_multiplied_by_nearly_one_changes_in_bfloat16_as_well(name: str, parameter: str, factor: float) -> None:
    """The nearest numbers to 1 in bfloat16 are 0.8 % apart: a factor of 1.003 would be lost, and not its product."""
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(64))
    delta = METHODS[name]().build(Place("layer", layer, (64, 64)))
    x = torch.randn(1000, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(delta(layer, (x,), x.clone()), x)
        getattr(delta, parameter).mul_(factor)
        changed = delta(layer, (x,), x.clone()).float()
    growth = float((changed * x.float()).sum() / x.float().square().sum()) - 1
    assert growth == pytest.approx(0.003, rel=0.1)


def test_state_brings_back_everything_trained(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    disturb(adapter)
    state, expected = adapter.state(), logits(model, batch)
    disturb(adapter)
    assert not torch.equal(logits(model, batch), expected)
    adapter.load_state(state)
    assert torch.equal(logits(model, batch), expected)


def test_merged_gives_the_same_logits(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    disturb(adapter)
    expected = logits(model, batch)
    names = set(build_names(model))
    if method.name in NOT_MERGEABLE:
        with pytest.raises(ValueError, match="cannot be merged"):
            adapter.merge()
        assert torch.equal(logits(model, batch), expected)
        return
    adapter.merge()
    scale = max(1.0, float(expected.abs().max()))  # fp32 rounds in proportion to what it adds up
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5 * scale, rtol=0)
    assert set(dict(model.named_parameters())) == names


def build_names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".deltas." not in name]


def test_gradient_checkpointing_changes_no_gradient(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    disturb(adapter)
    model.eval()
    model(**batch).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in adapter.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    new = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.23
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    model.train()
    for module in model.modules():  # checkpointing runs in training mode only; dropout would hide the comparison
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model(**batch).loss.backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_overfits_a_small_batch(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    if method.name == "head":
        pytest.skip("a linear head on a random frozen encoder need not separate the rows")
    if method.name == "hard-prompt":
        pytest.skip("real tokens alone need not fit; that they are found is tested in test_schedules.py")
    adapter = attach(model, method)
    adapter.clock.steps = 40
    optimizer = torch.optim.AdamW(parameter_groups(adapter, 2e-2 if method.site == "layer" else 5e-2))
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_copy_of_the_model_is_independent(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    disturb(adapter)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    disturb(adapter)
    assert torch.equal(logits(twin, batch), expected)
    assert not torch.equal(logits(model, batch), expected)
