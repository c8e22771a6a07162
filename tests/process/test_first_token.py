"""The last block on the first token alone: the same logits and gradients, and not where more of it is read."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen import METHODS, FullFineTuning, HeadOnly, LoRA, attach, rows
from smidgen.own import own_modules
from smidgen.process import first_token
from smidgen.process.first_token import reading_first_token
from smidgen.process.models import gradient_checkpointing, logits
from smidgen.trunk import Trunk
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb

READS_FIRST = ("bert", "roberta", "distilbert", "electra", "modernbert")
READS_MORE = ("llama-classifier", "deberta", "bert-tokens")
"""The last token; the first, but with one layer for queries and the positions between; all."""


def plain(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    answer: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return answer


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@contextlib.contextmanager
def widths(model: PreTrainedModel, seen: list[int]):
    """How many tokens the last block's feed-forward network computes."""
    layer = [module for name, module in own_modules(model) if ".2." in name and isinstance(module, nn.Linear)][-1]
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]), prepend=True)
    yield
    handle.remove()


@pytest.mark.parametrize("name", METHODS)
def test_logits_and_gradients_are_those_of_all_tokens(name: str) -> None:
    model, batch = build("bert"), make_batch("bert")
    adapter = attach(model, FullFineTuning(keep_base=True) if name == "full" else example(name, "bert"))
    disturb(adapter)
    found = []
    for answer in (plain(model, batch), logits(model, batch, "fp32")):
        answer.square().sum().backward()
        found.append([answer.detach(), *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)])
        model.zero_grad()
    for expected, seen in zip(*found, strict=True):
        assert float((seen - expected).detach().norm()) <= 1e-6 + 1e-5 * float(expected.detach().norm())


@pytest.mark.parametrize("name", [*READS_FIRST, *READS_MORE])
def test_it_is_used_where_the_first_token_alone_is_read(name: str) -> None:
    model, batch, seen = build(name), make_batch(name), list[int]()
    with torch.no_grad():
        expected = plain(model, batch)
        with reading_first_token(model, inputs_of(batch)), widths(model, seen):
            found = plain(model, batch)
    torch.testing.assert_close(found, expected)
    assert seen == [1 if name in READS_FIRST else batch["input_ids"].shape[1]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", READS_FIRST)
def test_only_what_meets_the_other_tokens_gets_zeros_for_them(name: str, padded: bool) -> None:
    model, batch = build(name), inputs_of(make_batch(name))
    if not padded:  # it is tried on these, and must serve padded rows
        batch = {"input_ids": batch["input_ids"][::2], "attention_mask": batch["attention_mask"][::2]}
    with reading_first_token(model, batch):
        pass
    filled = [layer for layer, answers_for_all in (tried(model) or {}).items() if answers_for_all]
    assert len(filled) == 1  # the queries
    with torch.no_grad(), reading_first_token(model, batch):
        for own in (batch, inputs_of(make_batch(name))):
            found = model(**own).logits
            torch.testing.assert_close(found, logits_of_all(model, own))


def tried(model: PreTrainedModel) -> first_token.Layers | None:
    return first_token._known[model].layers


def logits_of_all(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    answer: Tensor = copy.deepcopy(model)(**inputs).logits
    return answer


def test_a_trial_that_fails_leaves_no_hook_behind() -> None:
    model, batch = build("bert"), inputs_of(make_batch("bert"))
    expected, calls = model(**batch).logits, list[int]()

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    handle = model.classifier.register_forward_hook(fail)
    with pytest.raises(MemoryError), reading_first_token(model, batch):
        pass
    handle.remove()
    assert torch.equal(model(**batch).logits, expected)


def test_a_text_of_one_token_is_no_proof() -> None:
    model, batch = build("bert"), inputs_of(make_batch("bert"))
    with reading_first_token(model, {name: value[:, :1] for name, value in batch.items()}):
        pass
    assert tried(model) is None


def test_no_product_copies_its_weight_for_every_row() -> None:
    model, batch = build("bert"), make_batch("bert")
    attach(model, LoRA(dropout=0.1))
    logits(model, batch, "fp32")  # tries the model
    with torch.profiler.profile() as profile:
        logits(model, batch, "fp32").sum().backward()
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}


def test_a_head_of_zeros_is_no_proof() -> None:
    model, batch = build("llama-classifier"), make_batch("llama-classifier")
    model.score.weight.data.zero_()
    with reading_first_token(model, inputs_of(batch)):
        pass
    assert tried(model) == {}


def one_more_block(model: PreTrainedModel) -> None:
    layers = model.bert.encoder.layer
    layers.append(copy.deepcopy(layers[-1]))


def another_list_of_blocks(model: PreTrainedModel) -> None:
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = torch.nn.ModuleList([*layers, copy.deepcopy(layers[0])])


class Mean(torch.nn.Module):
    """A pooler that reads all tokens."""

    def forward(self, states: Tensor) -> Tensor:
        return states.mean(1)


def another_reader(model: PreTrainedModel) -> None:
    model.bert.pooler = Mean()


@pytest.mark.parametrize("change", [one_more_block, another_list_of_blocks, another_reader])
def test_a_model_that_was_changed_is_tried_again(change: Any) -> None:
    model, batch = build("bert"), inputs_of(make_batch("bert"))
    with reading_first_token(model, batch):
        pass
    assert tried(model)
    change(model)
    expected = model(**batch).logits
    with reading_first_token(model, batch):
        torch.testing.assert_close(model(**batch).logits, expected)


def test_an_adapter_that_came_later_is_no_change() -> None:
    model, batch = build("bert"), inputs_of(make_batch("bert"))
    with reading_first_token(model, batch):
        pass
    before = first_token._known[model]
    attach(model, LoRA())
    with reading_first_token(model, batch):
        pass
    assert first_token._known[model] is before


def test_a_block_that_is_not_computed_is_no_proof() -> None:
    model, batch = build("llama-classifier"), make_batch("llama-classifier")
    attach(model, HeadOnly())
    trunk = Trunk.of(model, inputs_of(batch))
    assert trunk is not None
    with trunk.given(trunk.states(inputs_of(batch))), reading_first_token(model, inputs_of(batch)):
        pass
    assert tried(model) is None


def test_a_model_is_tried_once_and_keeps_its_mode_and_the_random_state() -> None:
    model, batch = build("bert").train(), make_batch("bert")
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    for _ in range(2):
        with reading_first_token(model, inputs_of(batch)):
            pass
    assert len(calls) == 3
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def whole_block(model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    seen: list[int] = []
    with widths(model, seen):
        logits(model, batch, "fp32")
    return seen[-1] > 1


def test_all_tokens_are_computed_where_something_may_need_them() -> None:
    model, batch = build("bert"), make_batch("bert")
    adapter = attach(model, LoRA())
    assert not whole_block(model, batch)
    model.train()
    with gradient_checkpointing(model, True):
        assert whole_block(model, batch)
    model.eval()
    with rows(model, ["default"] * 4):
        assert whole_block(model, batch)
    adapter.detach()
    attach(model, METHODS["parallel"]())  # reads what goes into the sublayer, of all tokens
    assert whole_block(model, batch)
