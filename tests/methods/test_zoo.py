"""Every technique on every architecture either works, or refuses it with the reason; nothing is silent."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import METHODS, attach, rows
from tests.conftest import OPTIONS, fused
from tests.methods.test_contract import disturb
from tests.zoo import ZOO, build, make_batch

PREFIXES = {"prefix-tuning", "p-tuning-v2", "llama-adapter", "mam", "unipelt"}
PROMPTS = {"prompt-tuning", "p-tuning", "hard-prompt"}
ATTENTION_ONLY = {"mixtral", "qwen3-moe"}
LANGUAGE_MODELS = {"bert-gaps", "qwen3", "gemma2", "phi3", "gpt-neox", "opt", "t5", "bart", *ATTENTION_ONLY}
NO_BIASES = {"modernbert", "qwen3", "gemma2", "phi3", "t5", *ATTENTION_ONLY}
OF_LAYERS = set(METHODS) - PREFIXES - PROMPTS - {"full", "head", "bitfit", "norm-tuning", "progressive"}
OF_BLOCKS = {"pfeiffer", "adapter-fusion", "adapter-drop", "invertible", "representation-mixing", "loreft"}

REFUSED = [
    (LANGUAGE_MODELS, {"head"}, "has no task head"),
    (NO_BIASES, {"bitfit"}, "has no biases"),
    ({"deberta"}, PREFIXES, "computes its attention by itself"),
    (
        {"vit"},
        {"prefix-tuning", "mam"},
        "real tokens, and ViTForImageClassification reads pixel_values. Use start='random'",
    ),
    ({"vit"}, PROMPTS, "prompts need an Embedding"),
    (ATTENTION_ONLY, {*OF_LAYERS - OF_BLOCKS, "mam"}, "mlp.experts.gate_up_proj and .*mlp.experts.down_proj"),
]
"""What an architecture cannot take, and what the error says."""

NOT_BY_ROW = [
    ({"deberta"}, {*OF_LAYERS - OF_BLOCKS - {"houlsby", "parallel", "compacter", "ia3"}, "bitfit"}, "computes 1"),
    ({"deberta"}, {"full", "progressive"}, "computes 1"),
    ({"deberta", "modernbert"}, PROMPTS, "counts distances by columns"),
    ({"bart"}, PROMPTS, "takes no position_ids"),
    ({"t5"}, {"full", "progressive"}, "relative_attention_bias.weight, which is looked up for pairs of positions"),
    (ATTENTION_ONLY, {"full", "progressive"}, "TopKRouter .* gives no tensor"),
]
"""Where a model computes once what all rows use, counts columns or sorts tokens: rows cannot have their own adapter."""


def why(table: list[tuple[set[str], set[str], str]], architecture: str, technique: str) -> str | None:
    return next((text for where, what, text in table if architecture in where and technique in what), None)


def answers(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    result = found.start_logits if hasattr(found, "start_logits") else found.logits
    mask = batch.get("attention_mask")
    if mask is not None and result.shape[:2] == mask.shape:
        result = result * mask.view(*mask.shape, *[1] * (result.dim() - 2))  # padding differs with the batch
    return result.clone()


@pytest.mark.parametrize("technique", METHODS)
@pytest.mark.parametrize("architecture", ZOO)
def test_a_technique_works_or_says_why_not(architecture: str, technique: str) -> None:
    model, batch = build(architecture), make_batch(architecture)
    before = answers(model, batch)
    fusion = {"adapters": fused(build, architecture)} if technique == "adapter-fusion" else {}
    method = METHODS[technique](**OPTIONS.get(technique, fusion))
    if not method.keeps_base:
        method = dataclasses.replace(method, keep_base=True)
    reason = why(REFUSED, architecture, technique)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            attach(model, method)
        assert torch.equal(answers(model, batch), before)
        return
    adapter = attach(model, method, name="one")
    model(**batch).loss.backward()
    adapter.check_gradients()
    disturb(adapter)
    changed = answers(model, batch)
    assert changed.shape == before.shape
    assert not torch.equal(changed, before)
    reason = why(NOT_BY_ROW, architecture, technique)
    names = ["one", None, "one", "one"]
    if reason is not None:
        with pytest.raises((ValueError, RuntimeError), match=reason), rows(model, names):
            model(**batch)
    else:
        with rows(model, names):
            mixed = answers(model, batch)
        expected = changed.clone()
        expected[1] = before[1]
        torch.testing.assert_close(mixed, expected, atol=5e-5, rtol=1e-4)
    adapter.detach()
    assert torch.equal(answers(model, batch), before)


@pytest.mark.parametrize("architecture", sorted(ATTENTION_ONLY))
@pytest.mark.parametrize("technique", ["lora", "dora", "oft", "houlsby"])
def test_what_a_mixture_of_experts_can_take_is_what_the_error_says(architecture: str, technique: str) -> None:
    model, batch = build(architecture), make_batch(architecture)
    with pytest.raises(ValueError, match="Use '[a-z-]+' instead") as error:
        attach(model, METHODS[technique]())
    instead = re.search(r"Use '([a-z-]+)' instead", str(error.value))
    assert instead is not None
    adapter = attach(model, METHODS[technique](targets=instead[1], **OPTIONS.get(technique, {})))
    model(**batch).loss.backward()
    adapter.check_gradients()
