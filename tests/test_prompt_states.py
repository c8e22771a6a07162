"""A decoder's prompt computed once: the same answers as computed for each row, and only where they are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smidgen import Adapter, LoRA, Method, PrefixTuning, PromptTuning, attach, rows
from smidgen.prompt_states import prompts_kept
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb

COUNT = 5
LOOKING_BACK = (
    *("llama", "gpt2", "llama-classifier", "qwen3", "gemma2"),
    *("phi3", "gpt-neox", "opt", "mixtral", "qwen3-moe"),
)


def made(name: str, *beside: Method) -> tuple[PreTrainedModel, Adapter, dict[str, Tensor]]:
    """A model with a prompt, and a batch without labels, of which one row is padded."""
    model, batch = build(name).eval(), make_batch(name)
    adapter = attach(model, [PromptTuning(length=COUNT, start="random"), *beside])
    disturb(adapter)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).clone()
    mask[0, -2:] = 0
    return model, adapter, {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def embedded(model: PreTrainedModel):
    """How many (rows, tokens) each call of the input embedding has."""
    seen: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(tuple(ids[0].shape)))
    yield seen
    handle.remove()


def for_each_row(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """With a gradient every row has its own prompt."""
    with embedded(model) as seen:
        logits: Tensor = model(**batch).logits.detach()
    count, length = batch["input_ids"].shape
    assert seen == [(count, length + COUNT)]
    return logits


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_the_answers_are_those_of_a_prompt_in_every_row(name: str) -> None:
    model, _, batch = made(name)
    expected, (count, length) = for_each_row(model, batch), batch["input_ids"].shape
    with torch.no_grad(), embedded(model) as seen:
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
        without = model(**batch, use_cache=False)
    torch.testing.assert_close(without.logits, expected, atol=1e-5, rtol=1e-4)
    assert without.past_key_values is None
    assert seen == 2 * [(1, COUNT), (count, length)]


@pytest.mark.parametrize("beside", [LoRA(), PrefixTuning(length=3)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_other_techniques_beside_it(name: str, beside: Method) -> None:
    model, _, batch = made(name, beside)
    expected = for_each_row(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_several_batches_need_it_once_and_what_comes_after_sees_what_has_changed() -> None:
    model, adapter, batch = made("llama")
    with torch.no_grad(), embedded(model) as seen, prompts_kept():
        first = model(**batch).logits
        second = model(input_ids=batch["input_ids"][2:3]).logits
    assert [tokens for _, tokens in seen].count(COUNT) == 1
    torch.testing.assert_close(second, first[2:3], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.data.mul_(2)
        changed = model(**batch).logits
    assert not torch.allclose(changed, first, atol=1e-3)
    torch.testing.assert_close(changed, for_each_row(model, batch), atol=1e-5, rtol=1e-4)


def test_another_adapter_has_its_own() -> None:
    model, first, batch = made("llama")
    disturb(other := attach(model, PromptTuning(length=COUNT, start="random"), name="other"))
    found = []
    with torch.no_grad(), prompts_kept():
        for adapter in (first, other):
            adapter.activate()
            found.append(model(**batch).logits)
    assert not torch.allclose(*found, atol=1e-3)
    torch.testing.assert_close(found[1], for_each_row(model, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "asked",
    [
        lambda model, batch: model.train()(**batch),
        lambda model, batch: model(**batch, labels=batch["input_ids"]),
        lambda model, batch: model(**batch, output_hidden_states=True),
        lambda model, batch: model(input_ids=batch["input_ids"][:1]),
    ],
    ids=["dropout", "labels", "hidden states", "one row"],
)
def test_every_row_has_its_own_where_it_may_differ_or_is_asked_for(asked: Callable[..., object]) -> None:
    model, _, batch = made("llama")
    with torch.no_grad(), embedded(model) as seen:
        asked(model, batch)
    assert len(seen) == 1


def test_rows_of_several_adapters_have_their_own() -> None:
    model, _, batch = made("llama")
    disturb(attach(model, PromptTuning(length=3, start="random"), name="other"))
    with torch.no_grad(), embedded(model) as seen, rows(model, ["default", "other", None, "other"]):
        model(**batch)
    assert len(seen) == 1


def test_generate_begins_after_it_with_beams_as_well() -> None:
    model, _, batch = made("llama")
    ids = batch["input_ids"]
    with embedded(model) as seen:
        model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False)
    assert seen[:2] == [(1, COUNT), (2 * len(ids), ids.shape[1])]
