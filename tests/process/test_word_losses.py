"""Losses of words without their logits: the same numbers and gradients, in less memory, and not where they differ."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from smidgen import BitFit, FullFineTuning, LoRA, PromptTuning, attach
from smidgen.placeholders import IGNORED
from smidgen.process import word_losses as words
from smidgen.process.evaluate import loss_sum, row_losses
from smidgen.process.models import logits
from smidgen.process.word_losses import plain_head, word_losses
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb

PLAIN = ("llama", "gpt2", "qwen3", "phi3", "gpt-neox", "opt")
CAPPED = ("gemma2",)


@pytest.mark.parametrize("at_once", [1, 60 * 3, 1 << 24])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradient_is_that_of_finite_differences(
    at_once: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "AT_ONCE", at_once)
    weight, labels = torch.randn(60, 8, dtype=torch.float64), torch.randint(60, (7,))
    bias = torch.randn(60, dtype=torch.float64) if with_bias else None
    states = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda states: word_losses(states, weight, bias, labels), (states,))
    expected = functional.cross_entropy(functional.linear(states, weight, bias), labels, reduction="none")
    torch.testing.assert_close(word_losses(states, weight, bias, labels), expected)


def test_no_token_has_no_loss() -> None:
    states = torch.randn(0, 8, requires_grad=True)
    losses = word_losses(states, torch.randn(60, 8), None, torch.empty(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)


def batch_of(name: str) -> dict[str, Tensor]:
    batch = dict(make_batch(name))
    batch["labels"] = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.4, IGNORED)
    batch["labels"][2] = IGNORED  # a row without any
    return batch


@pytest.mark.parametrize("name", [*PLAIN, *CAPPED, "bert-gaps"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradients_are_those_of_the_logits(name: str, precision: str) -> None:
    model, batch = build(name), batch_of(name)
    adapter = attach(model, LoRA())
    disturb(adapter)
    found = []
    for losses in (
        loss_sum(logits(model, batch, precision), batch["labels"]),
        row_losses(model, batch, precision),
    ):
        losses.sum().backward()
        found.append([losses.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())])
        model.zero_grad()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for expected, seen in zip(*found, strict=True):
        assert float((seen - expected).norm()) <= tolerance * float(expected.norm()) + 1e-6


@pytest.mark.parametrize("name", [*PLAIN, *CAPPED])
def test_a_model_that_caps_its_logits_is_seen(name: str) -> None:
    model = build(name)
    attach(model, LoRA())
    assert (plain_head(model, batch_of(name), "fp32") is None) is (name in CAPPED)


@contextlib.contextmanager
def kept() -> Iterator[Counter[tuple[int, ...]]]:
    shapes: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        shapes[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    model, batch = build("llama"), batch_of("llama")
    attach(model, LoRA())
    known = int((batch["labels"] != IGNORED).sum())
    with kept() as shapes:
        loss_sum(logits(model, batch, "fp32"), batch["labels"]).sum()
    assert shapes[known, 60]
    with kept() as shapes:
        row_losses(model, batch, "fp32").sum()
    assert not shapes[known, 60]


def test_logits_are_computed_where_the_head_learns_or_text_is_longer() -> None:
    model, batch = build("gpt2"), batch_of("gpt2")
    adapter = attach(model, FullFineTuning(keep_base=True))
    assert plain_head(model, batch, "fp32") is None
    adapter.detach()
    head = attach(model, LoRA(targets="lm_head"))
    disturb(head)
    assert plain_head(model, batch, "fp32") is None
    head.detach()
    attach(model, PromptTuning(length=3))
    expected = loss_sum(logits(model, batch, "fp32"), batch["labels"])
    torch.testing.assert_close(row_losses(model, batch, "fp32"), expected)


def test_a_bias_that_learns_gets_its_gradient() -> None:
    config = transformers.PhiConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.PhiForCausalLM(config).eval()
    adapter = attach(model, BitFit())
    ids = torch.randint(5, 40, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    row_losses(model, batch, "fp32").sum().backward()
    assert "lm_head.bias" in adapter.own_names
    assert bool(model.lm_head.bias.grad.any())
