"""Every technique on a GPU does what it does on the CPU; skipped where there is none.

The tests of the process use a GPU by themselves where there is one, as `smidgen train` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import METHODS, Adapter, FullFineTuning, LoRA, Method, attach, load, rows
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import NOT_MERGEABLE, disturb, logits
from tests.test_rows import NAMES, alone, two, visible

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

Batch = dict[str, torch.Tensor]
GPU = torch.device("cuda")


@pytest.fixture(params=["bert", "llama", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, architecture: str) -> Method:
    return example(request.param, architecture)


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    return build(architecture).to(GPU)  # type: ignore[arg-type]


@pytest.fixture
def batch(architecture: str) -> Batch:
    return there(make_batch(architecture))


def there(batch: Batch) -> Batch:
    return {name: tensor.to(GPU) for name, tensor in batch.items()}


def moved(model: PreTrainedModel, method: Method) -> Adapter:
    """Attached, and moved away from its start by numbers that hang on no device."""
    adapter = attach(model, method)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return adapter


def learned(model: PreTrainedModel, adapter: Adapter, batch: Batch) -> tuple[torch.Tensor, Batch]:
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in adapter.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), gradients


def near(found: tuple[torch.Tensor, Batch], expected: tuple[torch.Tensor, Batch]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4 * largest, rtol=1e-3, msg=name)


def test_attached_on_the_cpu_and_moved_it_learns_what_it_learns_there(method: Method, architecture: str) -> None:
    model, batch = build(architecture), make_batch(architecture)
    adapter = moved(model, method)
    expected = learned(model, adapter, batch)
    model.zero_grad()
    model.to(GPU)  # type: ignore[arg-type]
    near(learned(model, adapter, there(batch)), expected)


def test_attached_on_the_gpu_all_of_it_is_there(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, method)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    adapter.clock.steps = 1
    learned(model, adapter, batch)
    adapter.check_gradients()


def test_saved_on_the_gpu_it_is_the_same_there_and_near_on_the_cpu(
    method: Method, model: PreTrainedModel, batch: Batch, architecture: str, tmp_path: Path
) -> None:
    disturb_there(adapter := attach(model, method))
    expected = logits(model, batch)
    adapter.save(tmp_path / "saved")
    again, elsewhere = build(architecture).to(GPU), build(architecture)  # type: ignore[arg-type]
    load(again, tmp_path / "saved").save(tmp_path / "again")
    files = [(tmp_path / folder / "adapter.safetensors").read_bytes() for folder in ("saved", "again")]
    assert files[0] == files[1]
    torch.testing.assert_close(logits(again, batch), expected, atol=2e-5, rtol=1e-4)
    load(elsewhere, tmp_path / "saved")
    torch.testing.assert_close(logits(elsewhere, make_batch(architecture)), expected.cpu(), atol=1e-4, rtol=1e-3)


def disturb_there(adapter: Adapter) -> None:
    """As the contract's, whose numbers come from the CPU."""
    device = next(adapter.parameters()).device
    adapter.model.cpu()
    disturb(adapter)
    adapter.model.to(device)


def test_merged_or_disabled_on_the_gpu(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    if not method.keeps_base:
        pytest.skip("it trains the base model's own weights")
    before = logits(model, batch)
    disturb_there(adapter := attach(model, method))
    expected = logits(model, batch)
    with adapter.disabled():
        assert torch.equal(logits(model, batch), before)
    if method.name in NOT_MERGEABLE:
        adapter.detach()
        assert torch.equal(logits(model, batch), before)
        return
    adapter.merge()
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(model, batch), expected, atol=2e-5 * scale, rtol=0)


def test_a_row_in_a_mixed_batch_equals_its_solo_run(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    if isinstance(method, FullFineTuning):
        method = FullFineTuning(keep_base=True)
    model.cpu()
    adapters = two(model, method, LoRA(rank=2))
    model.to(GPU)  # type: ignore[arg-type]
    expected = alone(model, adapters, batch)
    with rows(model, NAMES):
        mixed = logits(model, batch)
    torch.testing.assert_close(visible(mixed, batch), visible(expected, batch), atol=5e-5, rtol=1e-3)
    adapters["one"].detach()
    assert next(model.parameters()).device.type == "cuda"


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_answers_are_generated_on_the_gpu_as_on_the_cpu(method: Method, architecture: str) -> None:
    model, batch = build(architecture), make_batch(architecture, rows=1)
    moved(model, method)
    wanted = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 6}
    expected = model.generate(**wanted, do_sample=False)  # type: ignore[operator]
    model.to(GPU)  # type: ignore[arg-type]
    wanted |= {name: wanted[name].to(GPU) for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**wanted, do_sample=False).cpu(), expected)  # type: ignore[operator]
