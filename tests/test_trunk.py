"""The frozen trunk: where it ends, that starting from its states changes no bit, and when there is none."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from smidgen import (
    AdapterDrop,
    FullFineTuning,
    HeadOnly,
    LoRA,
    Method,
    NormTuning,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    attach,
)
from smidgen.layers import is_causal
from smidgen.trunk import Trunk
from tests.conftest import ARCHITECTURES, build, make_batch
from tests.zoo import ZOO

STACKS = {"t5", "bart"}
"""Encoder-decoders."""
WITH_TEXT = [name for name in [*ARCHITECTURES, *ZOO] if name != "vit" and name not in STACKS]


def inputs_of(name: str, model: PreTrainedModel) -> dict[str, Any]:
    batch = make_batch(name)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        **({"use_cache": False} if is_causal(model) else {}),
    }


def opened(name: str = "bert") -> tuple[PreTrainedModel, dict[str, Any], Trunk]:
    """A model whose last block learns, what it is called with, and its trunk."""
    model = build(name)
    attach(model, LoRA(layers="last:1"))
    inputs = inputs_of(name, model)
    trunk = Trunk.of(model, inputs)
    assert trunk is not None
    return model, inputs, trunk


def trunk_of(method: Method, name: str = "bert") -> Trunk | None:
    model = build(name)
    attach(model, method)
    return Trunk.of(model, inputs_of(name, model))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_starting_from_its_states_changes_no_bit_of_the_answer_nor_of_a_gradient(name: str) -> None:
    model = build(name)
    adapter = attach(model, LoRA(targets="attention", layers="last:1"))
    for parameter in adapter.parameters():
        parameter.data += 0.1
    inputs = inputs_of(name, model)
    trunk = Trunk.of(model, inputs)
    assert trunk is not None
    assert trunk.depth == 2
    assert trunk.is_exact(inputs)
    found = []
    for context in (contextlib.nullcontext(), trunk.given(trunk.states(inputs))):
        with context:
            answer = model(**inputs)[0]
            answer.square().mean().backward()
        found.append([answer.detach(), *(parameter.grad for parameter in adapter.parameters())])
        model.zero_grad(set_to_none=True)
    for whole, given in zip(*found, strict=True):
        assert torch.equal(whole, given)


def test_what_is_padded_may_be_anything() -> None:
    model, inputs, trunk = opened()
    states = trunk.states(inputs)
    with torch.no_grad(), trunk.given(states):
        answer = model(**inputs).logits
    states[1::2, -3:] = 0.0
    with torch.no_grad(), trunk.given(states):
        assert torch.equal(answer, model(**inputs).logits)


@pytest.mark.parametrize("block", [0, 1])
def test_its_blocks_are_not_computed(block: int) -> None:
    model, inputs, trunk = opened()
    states, calls = trunk.states(inputs), []
    model.bert.encoder.layer[block].attention.register_forward_hook(lambda *_: calls.append(block))
    with trunk.given(states):
        model(**inputs)
    assert not calls
    model(**inputs)
    assert calls == [block]


@pytest.mark.parametrize(
    ("method", "depth"),
    [
        (LoRA(layers="last:1"), 2),
        (LoRA(layers="1"), 1),
        (PrefixTuning(layers="last:2"), 1),
        (HeadOnly(), 3),
        (LoRA(), None),
        (Pfeiffer(), None),
        (PromptTuning(), None),
        (FullFineTuning(), None),
        (AdapterDrop(drop=2), None),  # the lower ones are left out when it serves, and trained nevertheless
        (AdapterDrop(drop=1, robust=False), 1),
    ],
    ids=repr,
)
def test_it_ends_below_the_first_thing_that_learns(method: Method, depth: int | None) -> None:
    trunk = trunk_of(method)
    assert (trunk.depth if trunk else None) == depth


def test_what_all_blocks_read_is_no_trunk_where_it_learns() -> None:
    """DeBERTa's norm of its relative positions stands after the blocks, and goes into all of them."""
    model = build("deberta")
    adapter = attach(model, NormTuning(layers="last:1"))
    before = Trunk.of(model, inputs_of("deberta", model))
    assert before is not None
    assert before.depth == 2
    model.deberta.encoder.rel_embeddings.weight.requires_grad_(True)
    assert Trunk.of(model, inputs_of("deberta", model)) is None
    adapter.detach()


def test_a_tied_embedding_that_learns_leaves_no_trunk() -> None:
    model = build("gpt2")
    attach(model, LoRA(layers="last:1"))
    model.lm_head.weight.requires_grad_(True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert Trunk.of(model, inputs_of("gpt2", model)) is None


def test_an_adapter_that_serves_below_leaves_no_trunk() -> None:
    model = build("bert")
    attach(model, LoRA(), name="serves")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    assert Trunk.of(model, inputs_of("bert", model)) is None


@pytest.mark.parametrize("name", sorted(STACKS))
def test_a_model_of_two_stacks_has_none(name: str) -> None:
    model = build(name)
    attach(model, LoRA(layers="last:1"))
    assert Trunk.of(model, inputs_of(name, model)) is None


@pytest.mark.parametrize(("name", "leaves_out"), [("bert", True), ("gpt2", True), ("llama", False), ("qwen3", False)])
def test_dropout_in_it_is_seen_and_can_be_stopped(name: str, leaves_out: bool) -> None:
    model = build(name)
    attach(model, LoRA(layers="last:1", targets="attention"))
    inputs = inputs_of(name, model)
    trunk = Trunk.of(model, inputs)
    assert trunk is not None
    assert not trunk.leaves_out()
    model.train()
    assert trunk.leaves_out() is leaves_out
    trunk.eval()
    assert not trunk.leaves_out()
    with torch.no_grad():
        assert torch.equal(trunk.states(inputs), trunk.states(inputs))
    last = [name for name, module in model.named_modules() if module.training and "Dropout" in type(module).__name__]
    assert any("2" in name for name in last) is leaves_out  # what learns still drops out


def test_layers_that_are_left_out_at_random_cannot_be_stopped() -> None:
    model = build("opt")
    attach(model, LoRA(layers="last:1"))
    trunk = Trunk.of(model, inputs_of("opt", model))
    assert trunk is not None
    model.model.decoder.layerdrop = 0.1
    model.train()
    trunk.eval()
    assert trunk.leaves_out()


def test_its_fingerprint_is_that_of_its_numbers() -> None:
    model, _, trunk = opened()
    before = trunk.fingerprint()
    model.bert.encoder.layer[2].output.dense.weight.data += 1
    model.classifier.weight.data += 1
    assert trunk.fingerprint() == before
    model.bert.embeddings.word_embeddings.weight.data[7, 3] += 1e-3
    assert trunk.fingerprint() != before


def test_its_states_are_at_the_positions_that_a_prefix_shifts_them_to() -> None:
    model = build("bert")
    attach(model, PrefixTuning(layers="last:1", length=5))
    inputs = inputs_of("bert", model)
    trunk = Trunk.of(model, inputs)
    assert trunk is not None
    assert trunk.is_exact(inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        with trunk.given(trunk.states(inputs)):
            assert torch.equal(model(**inputs).logits, expected)
    _, _, other = opened()
    assert trunk.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("name", ["XLNet", "Longformer", "Funnel"])
def test_blocks_that_pass_on_something_else_are_no_trunk(name: str) -> None:
    sizes = {"xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "vocab_size": 40}}
    sizes["longformer"] = {
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
        **{"vocab_size": 40, "attention_window": 4, "max_position_embeddings": 32, "pad_token_id": 0},
    }
    sizes["funnel"] = {
        **{"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16},
        "vocab_size": 40,
    }
    config = getattr(transformers, f"{name}Config")(**sizes[name.lower()])
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    model.base_model.requires_grad_(False)
    ids = torch.randint(5, 40, (1, 7))
    assert Trunk.of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) is None


def test_what_stands_above_it_may_drop_out() -> None:
    model = build("bert")
    attach(model, HeadOnly())
    inputs = inputs_of("bert", model)
    trunk = Trunk.of(model, inputs)
    assert trunk is not None
    model.train()
    trunk.eval()
    assert not trunk.leaves_out()
    assert model.bert.pooler.training
    assert model.dropout.training
