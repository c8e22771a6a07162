"""Several adapters of one model at once: a stack, in its order, of which the last one trains."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import AdapterDrop, DoRA, LoRA, Pfeiffer, PrefixTuning, Progressive, PromptTuning, attach, rows, stack
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb, logits


def two(first: object, second: object, architecture: str = "bert") -> PreTrainedModel:
    """A model with two adapters, disturbed, of which the second is active."""
    model = build(architecture)
    for name, method in (("language", first), ("task", second)):
        disturb(attach(model, method, name=name))  # type: ignore[arg-type]
    return model


def test_a_stack_acts_in_its_order() -> None:
    """Bottlenecks do not commute: the later one reads what the earlier one made."""
    batch, layers = make_batch("bert"), {"language": "1", "task": "1"}
    model = two(*(Pfeiffer(layers=layer) for layer in layers.values()))
    block = model.bert.encoder.layer[1]
    parts = dict(block.deltas.named_children())
    seen: list[torch.Tensor] = []
    handle = block.output.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    after = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    for order in (["language", "task"], ["task", "language"]):
        stack(model, order)
        seen.clear()
        logits(model, batch)
        hidden, expected = seen
        with torch.no_grad():
            for name in order:
                hidden = hidden + parts[f"{name}:pfeiffer"].added(hidden)
        torch.testing.assert_close(expected, hidden)
    handle.remove()
    after.remove()


def test_stacked_updates_add_up() -> None:
    batch = make_batch("llama")
    model = two(LoRA(rank=2), LoRA(rank=3, targets="attention"), "llama")
    stack(model, ["language", "task"])
    stacked = logits(model, batch)
    changes = {place.name: delta.update() for _, place, delta in model._smidgen_adapters["language"].entries()}
    task = model._smidgen_adapters["task"]
    task.activate()
    model._smidgen_adapters["language"].detach()
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight += change
    torch.testing.assert_close(logits(model, batch), stacked, atol=1e-4, rtol=1e-4)


def test_the_last_one_trains_and_the_others_are_frozen() -> None:
    model, batch = two(Pfeiffer(), LoRA()), make_batch("bert")
    language, task = model._smidgen_adapters.values()
    kept = next(task.parameters()).requires_grad_(False)  # as a user froze it
    stack(model, ["language", "task"])
    assert language.active
    assert task.active
    model(**batch).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in language.parameters())
    assert [p.requires_grad for p in task.parameters()] == [p is not kept for p in task.parameters()]
    stack(model, ["task", "language"])
    assert not any(parameter.requires_grad for parameter in task.parameters())
    assert all(parameter.requires_grad for parameter in language.parameters())
    task.activate()
    assert not language.active
    assert [p.requires_grad for p in task.parameters()] == [p is not kept for p in task.parameters()]


def test_a_frozen_one_with_a_schedule_stays_frozen() -> None:
    model = build("bert")
    lower = attach(model, Progressive(keep_base=True), name="lower")
    attach(model, LoRA(), name="upper")
    stack(model, ["lower", "upper"])
    assert not any(parameter.requires_grad for parameter in lower.parameters())
    lower.activate()
    assert any(parameter.requires_grad for parameter in lower.parameters())


def test_a_frozen_one_computes_as_it_is_served_while_another_trains() -> None:
    model, batch = build("llama"), make_batch("llama")
    below = attach(model, AdapterDrop(drop=1), name="below")  # leaves out 0 or 1 while it trains
    disturb(below)
    attach(model, LoRA(rank=2, dropout=0.5), name="above")
    stack(model, ["below", "above"])
    model.train()
    assert not any(delta.training for delta in below.deltas[0])
    below.activate()
    model.eval()
    served = logits(model, batch)
    model.train()
    assert not torch.equal(logits(model, batch), served)  # it trains again, with all bottlenecks at its first step
    stack(model, ["below", "above"])  # LoRA starts at zero
    assert torch.equal(logits(model, batch), served)


def test_the_head_is_the_last_one_s() -> None:
    model = two(Pfeiffer(), LoRA())
    language, task = model._smidgen_adapters.values()
    for name, adapter in (("language", language), ("task", task)):
        stack(model, [{"language": "task", "task": "language"}[name], name])
        assert model.classifier.weight is dict(adapter.named_parameters())["classifier.weight"]


def test_disabled_and_a_failed_attach_leave_the_stack_as_it_was() -> None:
    model, batch = two(Pfeiffer(), LoRA()), make_batch("bert")
    before = logits(build("bert"), batch)
    stack(model, ["language", "task"])
    stacked = logits(model, batch)
    task = model._smidgen_adapters["task"]
    with task.disabled():
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), stacked)
    with pytest.raises(ValueError, match="matches no layer"):
        attach(model, LoRA(targets="nowhere"), name="other")
    assert torch.equal(logits(model, batch), stacked)
    with rows(model, ["task", None, "language", None]):
        assert not torch.equal(logits(model, batch), stacked)
    assert torch.equal(logits(model, batch), stacked)
    task.deactivate()
    only = logits(model, batch)
    task.detach()
    assert torch.equal(logits(model, batch), only)
    model._smidgen_adapters["language"].detach()
    assert torch.equal(logits(model, batch), before)


def test_what_computes_with_a_layer_s_weight_comes_first() -> None:
    model = two(LoRA(rank=2), DoRA(rank=2))
    before = logits(model, make_batch("bert"))
    with pytest.raises(ValueError, match=r"DoRA reads the weight of .*, whose output another .*Put DoRA first"):
        stack(model, ["language", "task"])
    assert torch.equal(logits(model, make_batch("bert")), before)
    stack(model, ["task", "language"])


def test_prompts_and_prefixes_stack_and_generate() -> None:
    model = two(PromptTuning(length=2), PrefixTuning(length=3), "llama")
    stack(model, ["language", "task"])
    ids = make_batch("llama")["input_ids"][:1]
    made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("names", ["task", [], ["task", "task"], ["task", "nobody"]])
def test_a_stack_of_nothing_known_is_refused(names: list[str]) -> None:
    model, batch = two(Pfeiffer(), LoRA()), make_batch("bert")
    before = logits(model, batch)
    with pytest.raises(ValueError, match="stack takes a list of different names|no adapter 'nobody'"):
        stack(model, names)
    assert torch.equal(logits(model, batch), before)
    with rows(model, ["task"] * 4), pytest.raises(RuntimeError, match="Inside rows"):
        stack(model, ["task"])
