"""Every technique on the real MiniLM, one of each kind on the real SmolLM2; skipped where they cannot be fetched."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smidgen import METHODS, AdapterFusion, Method, Pfeiffer, UserError, attach, load
from smidgen.process.models import load_model
from smidgen.stacking import adapters
from tests.methods.test_contract import NOT_MERGEABLE, disturb

TEXTS = ["The train is late again.", "What a lovely day it was, from morning to night!"]
OF_EACH_KIND = ["lora", "dora", "houlsby", "ia3", "oft", "loreft", "prefix-tuning", "prompt-tuning", "unipelt"]


@functools.cache
def real(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; every test leaves the model as it was."""
    task = "classification" if name == "minilm" else "generation"
    try:
        model, tokenizer = load_model(f"embedded:{name}", task, ("no", "yes"), seed=0, precision="fp32")
    except UserError as error:
        pytest.skip(f"{name} is not here and cannot be fetched: {error}")
    return model.eval(), tokenizer


def batch(name: str) -> dict[str, torch.Tensor]:
    _, tokenizer = real(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    labels = (
        torch.tensor([0, 1]) if name == "minilm" else found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    )
    return {**found, "labels": labels}


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.clone()


def _method(technique: str, model: PreTrainedModel, folder: Path) -> Method:
    """The technique as it is by default, with two adapters to fuse and no chance of leaving one out."""
    if technique != "adapter-fusion":
        return METHODS[technique](**({"robust": False} if technique == "adapter-drop" else {}))
    for number in range(2):
        member = attach(model, Pfeiffer())
        disturb(member)
        member.save(folder / f"member{number}")
        member.detach()
    return AdapterFusion(adapters=f"{folder}/member0, {folder}/member1")


@pytest.mark.parametrize(
    ("name", "technique"),
    [*(("minilm", technique) for technique in METHODS), *(("smollm2", technique) for technique in OF_EACH_KIND)],
)
def test_a_technique_trains_is_saved_and_leaves_a_real_model_as_it_was(
    name: str, technique: str, tmp_path: Path
) -> None:
    (model, tokenizer), inputs = real(name), batch(name)
    for left in list(adapters(model).values()):  # by a test that failed
        left.detach()
    before, state = logits(model, inputs), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = _method(technique, model, tmp_path)
    if not method.keeps_base:
        method = dataclasses.replace(method, keep_base=True)
    adapter = attach(model, method, tokenizer=tokenizer)
    model(**inputs).loss.backward()
    adapter.check_gradients()
    disturb(adapter)
    changed = logits(model, inputs)
    assert not torch.equal(changed, before)
    adapter.save(tmp_path / "saved")
    adapter.detach()
    assert torch.equal(logits(model, inputs), before)
    again = load(model, tmp_path / "saved")
    scale = float(changed.abs().max())
    torch.testing.assert_close(logits(model, inputs), changed, atol=1e-6 * scale, rtol=1e-5)
    if technique not in NOT_MERGEABLE:
        again.merge()
        torch.testing.assert_close(logits(model, inputs), changed, atol=1e-4 * scale, rtol=1e-4)
        model.load_state_dict(state)
    else:
        again.detach()
    assert torch.equal(logits(model, inputs), before)
