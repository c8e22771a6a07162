"""A row in a batch whose rows have different adapters equals that row in a batch of its own adapter."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from smidgen import (
    METHODS,
    Adapter,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAPlus,
    Method,
    PrefixTuning,
    PromptTuning,
    RsLoRA,
    attach,
    rows,
)
from smidgen.hooks import Batch as Named
from smidgen.hooks import Route
from smidgen.methods.low_rank import LowRankDelta
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb, logits

Batch = dict[str, torch.Tensor]
NAMES = ["one", None, "other", "one"]


@pytest.fixture(params=["bert", "llama", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, architecture: str) -> Method:
    return FullFineTuning(keep_base=True) if request.param == "full" else example(request.param, architecture)


def two(model: PreTrainedModel, method: Method, other: Method) -> dict[str, Adapter]:
    adapters = {}
    for name, technique in (("other", other), ("one", method)):
        if not technique.keeps_base:
            technique = type(technique)(keep_base=True)
        adapters[name] = attach(model, technique, name=name)
        disturb(adapters[name])
    return adapters


def alone(model: PreTrainedModel, adapters: dict[str, Adapter], batch: Batch) -> torch.Tensor:
    """Each row by its own adapter, one pass each."""
    found = []
    for row, name in enumerate(NAMES):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        if name is None:
            next(iter(adapters.values())).activate()
            with next(iter(adapters.values())).disabled():
                found.append(logits(model, part))
        else:
            adapters[name].activate()
            found.append(logits(model, part))
    return torch.cat(found)


def visible(result: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits of real tokens; what stands in padding differs with the batch."""
    return result[batch["attention_mask"].bool()] if result.dim() == 3 else result


def test_a_row_in_a_mixed_batch_equals_its_solo_run(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapters = two(model, method, LoRA(rank=2))
    expected = alone(model, adapters, batch)
    with rows(model, NAMES):
        mixed = logits(model, batch)
    torch.testing.assert_close(visible(mixed, batch), visible(expected, batch), atol=2e-5, rtol=1e-4)
    after = alone(model, adapters, batch)
    assert torch.equal(after, expected)


def test_each_adapter_gets_the_gradients_of_its_rows(method: Method, model: PreTrainedModel, batch: Batch) -> None:
    adapters = two(model, method, LoRA(rank=2))
    ones = {key: value[[0, 3]] for key, value in batch.items()}
    adapters["one"].activate()
    loss = model(**{key: value for key, value in ones.items() if key != "labels"}).logits.square().sum()
    loss.backward()
    expected = {n: p.grad.clone() for n, p in adapters["one"].named_parameters() if p.grad is not None}
    model.zero_grad()
    with rows(model, NAMES):
        found = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        found[[0, 3]].square().sum().backward()
    grads = {n: p.grad for n, p in adapters["one"].named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-3, rtol=1e-3, msg=lambda t, n=name: f"{n}: {t}")
    assert not any(p.grad is not None and p.grad.any() for p in adapters["other"].parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_low_rank_updates_of_all_adapters_are_one_pass(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their ranks and scales; but not while one of them drops inputs at random."""
    model, batch, seen = build("bert"), make_batch("bert"), []
    several: list[Method] = [
        LoRA(rank=2, dropout=dropout),
        RsLoRA(rank=8, alpha=3.0),
        LoRAPlus(rank=4, targets="query"),
    ]
    for number, technique in enumerate(several):
        disturb(attach(model, technique, name=f"a{number}"))
    real = LowRankDelta.forward
    monkeypatch.setattr(LowRankDelta, "forward", lambda delta, *given: seen.append(delta) or real(delta, *given))
    names = ["a1", "a0", None, "a2"]
    model.train(dropout > 0)
    with rows(model, names):
        model(**batch)
    assert any(delta.dropout for delta in seen) if dropout else not seen


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("other", [LoRA(rank=2), PromptTuning(length=7), PrefixTuning(length=7)])
@pytest.mark.parametrize("name", ["lora", "ia3", "prefix-tuning", "llama-adapter", "prompt-tuning", "norm-tuning"])
def test_generation_of_mixed_rows(name: str, other: Method, beams: int) -> None:
    model, ids = build("llama"), make_batch("llama")["input_ids"][[0, 2, 0, 2]]
    adapters = two(model, example(name, "llama"), other)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    expected = []
    for row, wanted in enumerate(NAMES):
        chosen = adapters["one" if wanted is None else wanted]
        chosen.activate()
        if wanted is None:
            with chosen.disabled():
                expected += model.generate(ids[row : row + 1], **arguments).tolist()
        else:
            expected += model.generate(ids[row : row + 1], **arguments).tolist()
    with rows(model, NAMES):
        assert model.generate(ids, attention_mask=torch.ones_like(ids), **arguments).tolist() == expected


def test_prompts_of_different_lengths(architecture: str, model: PreTrainedModel, batch: Batch) -> None:
    adapters = two(model, PromptTuning(length=3), PromptTuning(length=8))
    with rows(model, NAMES):
        mixed = logits(model, batch)
    torch.testing.assert_close(
        visible(mixed, batch), visible(alone(model, adapters, batch), batch), atol=2e-5, rtol=1e-4
    )


def test_prompts_at_different_places_are_refused() -> None:
    model = build("bert")
    two(model, PromptTuning(length=3, placement="first"), PromptTuning(length=3, placement="after-first"))
    with rows(model, NAMES), pytest.raises(ValueError, match="the same placement"):
        model(**make_batch("bert"))


def test_what_rows_refuses() -> None:
    model = build("bert")
    attach(model, LoRA(rank=2), name="mine")
    with pytest.raises(ValueError, match="no adapter 'other'. It has: mine"), rows(model, ["mine", "other"]):
        pass
    with pytest.raises(ValueError, match="it got none"), rows(model, []):
        pass
    with pytest.raises(ValueError, match="takes a list with a name.*got 'mine'"), rows(model, "mine"):
        pass
    with rows(model, ["mine", None, "mine"]), pytest.raises(ValueError, match="3 rows, and the batch has 4"):
        model(**make_batch("bert"))


def test_what_computes_with_a_bias_that_is_trained_as_well_is_refused() -> None:
    model = build("bert")
    attach(model, [DoRA(), BitFit()], name="both")
    with (
        pytest.raises(ValueError, match=r"DoRA of adapter 'both' computes with bert\..*bias, which the adapter trains"),
        rows(model, ["both"]),
    ):
        pass


def test_inside_rows_the_active_adapter_is_not_changed() -> None:
    model = build("bert")
    adapter = two(model, LoRA(rank=2), LoRA(rank=3))["one"]
    with rows(model, NAMES):
        for use in (adapter.activate, adapter.detach, adapter.merge, adapter.disabled().__enter__):
            with pytest.raises(RuntimeError, match=r"Inside rows\(\)"):
                use()
        with pytest.raises(RuntimeError, match=r"Inside rows\(\)"), rows(model, NAMES):
            pass
    with rows(model, ["one", None]), pytest.raises(ValueError, match="2 rows, and the batch has 4"):
        model(**make_batch("bert"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_s_own_loss_counts_no_label_that_a_row_alone_does_not_have(architecture: str) -> None:
    model, batch = build(architecture), make_batch(architecture)
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"].clone()
    adapters = two(model, PromptTuning(length=4), LoRA(rank=2))
    total, count = 0.0, 0
    for row, name in enumerate(NAMES):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        labels = part["labels"].shape[1] - (name != "one")  # after a prompt the first token is predicted too
        chosen = adapters["one" if name is None else name]
        chosen.activate()
        with torch.no_grad():
            if name is None:
                with chosen.disabled():
                    loss = model(**part).loss
            else:
                loss = model(**part).loss
        total, count = total + float(loss) * labels, count + labels
    with rows(model, NAMES), torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(total / count, abs=1e-4)


def test_what_was_active_is_active_again_even_after_an_error() -> None:
    model, batch = build("bert"), make_batch("bert")
    adapters = two(model, LoRA(rank=2), LoRA(rank=3))
    expected = logits(model, batch)
    with pytest.raises(ZeroDivisionError), rows(model, NAMES):
        1 / 0  # noqa: B018
    assert adapters["one"].active
    assert torch.equal(logits(model, batch), expected)
    assert [p.requires_grad for p in adapters["other"].parameters()] == [False] * len(
        list(adapters["other"].parameters())
    )


def test_rows_of_a_module_whose_inner_layers_are_changed_as_well() -> None:
    """The head runs once more for each adapter, whose update has a scale of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=60, **sizes)).eval()
    batch = {name: tensor for name, tensor in make_batch("roberta").items() if name != "labels"}
    adapters = {}
    for name, alpha in (("other", 2.0), ("one", 16.0)):
        method = LoRA(rank=2, alpha=alpha, targets=r"lm_head\.dense")
        adapters[name] = attach(model, method, name=name, also_train=r"lm_head\.bias")
        disturb(adapters[name])
    expected = alone(model, adapters, batch)
    with rows(model, NAMES):
        mixed = logits(model, batch)
    torch.testing.assert_close(visible(mixed, batch), visible(expected, batch), atol=2e-5, rtol=1e-4)


def test_names_may_change_without_changing_who_serves() -> None:
    model, batch = build("bert"), make_batch("bert")
    two(model, LoRA(rank=2), LoRA(rank=3))
    names = list(NAMES)
    with rows(model, names):
        expected = logits(model, batch)
        names[0] = "other"
        assert torch.equal(logits(model, batch), expected)


def test_what_is_not_computed_row_by_row_is_refused() -> None:
    sizes = {"vocab_size": 60, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes))
    attach(model, LoRA(targets="feed-forward"), name="one")
    with pytest.raises(ValueError, match="a text's tokens before its rows"), rows(model, ["one"]):
        pass
    model = build("t5")
    attach(model, LoRA(), name="one", also_train="relative_attention_bias.*")
    with pytest.raises(ValueError, match=r"relative_attention_bias.*pairs of positions"), rows(model, ["one"]):
        pass


def test_tokens_in_one_list_have_the_factors_of_their_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OPT's feed-forward networks get them: a copy of the factors for each token would not fit into memory."""
    model, batch, seen = build("opt"), make_batch("opt"), []
    adapters = two(model, LoRA(rank=2), LoRA(rank=3))
    expected = alone(model, adapters, batch)
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda first, second: seen.append(len(second)) or real(first, second))
    with rows(model, NAMES), torch.no_grad():
        found = model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert set(seen) - {4 * model.config.num_attention_heads} == {len(NAMES)}


def test_states_of_another_length_than_the_rows_are_no_rows() -> None:
    """Even if it is a multiple of theirs; tokens in one list are."""
    route = Route("one", Named(["one", None]))
    assert route.served(torch.zeros(2, 6, 3)) == [0]
    assert route.served(torch.zeros(4, 3)) == [0, 1]
    assert route.of_parts(torch.zeros(4, 3)) == ["one", None]
    with pytest.raises(ValueError, match="names adapters for 2 rows, and a layer .* computes 4"):
        route.served(torch.zeros(4, 2, 3))
