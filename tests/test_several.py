"""Several adapters on one model, and everything else that may happen to a model between two passes."""

from __future__ import annotations

import cProfile
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from smidgen import (
    METHODS,
    Adapter,
    FullFineTuning,
    HeadOnly,
    LoRA,
    Parallel,
    PrefixTuning,
    PromptTuning,
    UserError,
    attach,
    load,
)
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb, logits

MECHANISMS = ["full", "head", "bitfit", "lora", "vera", "ia3", "oft", "houlsby", "parallel", "prefix-tuning"]
MECHANISMS += ["llama-adapter", "prompt-tuning"]
"""One technique of each way to act on a model."""
PAIRS = [(first, second) for first in MECHANISMS for second in MECHANISMS if first != "full"]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_any_technique_goes_on_a_model_that_has_any_other(first: str, second: str) -> None:
    model, batch = build("bert"), make_batch("bert")
    base = logits(model, batch)
    before = attach(model, example(first, "bert"), name="first")
    disturb(before)
    answer = logits(model, batch)
    kept = FullFineTuning(keep_base=True) if second == "full" else example(second, "bert")
    after = attach(model, kept, name="second")
    alone = attach(build("bert"), kept)
    assert [len(found) for found in after.places] == [len(found) for found in alone.places]
    assert after.trainable == alone.trainable
    assert after.total == alone.total
    model(**batch).loss.backward()
    after.check_gradients()
    before.activate()
    assert torch.equal(logits(model, batch), answer)
    before.detach()
    after.detach()
    assert torch.equal(logits(model, batch), base)


def test_a_prefix_starts_from_the_base_model_whatever_is_active() -> None:
    model, plain = build("llama"), build("llama")
    disturb(attach(model, PrefixTuning(length=4), name="first"))
    torch.manual_seed(5)
    second = attach(model, PrefixTuning(length=4), name="second")
    torch.manual_seed(5)
    expected = attach(plain, PrefixTuning(length=4))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), expected.parameters(), strict=True))


def test_a_failed_attach_leaves_the_active_adapter_active() -> None:
    model, batch = build("bert"), make_batch("bert")
    first = attach(model, LoRA(rank=2), name="first")
    disturb(first)
    answer = logits(model, batch)
    with pytest.raises(ValueError, match="matches no layer"):
        attach(model, LoRA(rank=2, targets="nothing"), name="second")
    assert first.active
    assert torch.equal(logits(model, batch), answer)
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_what_a_user_froze_stays_frozen() -> None:
    model = build("bert")
    adapter = attach(model, LoRA(rank=2))
    frozen = next(adapter.parameters())
    frozen.requires_grad_(False)
    with adapter.disabled():
        pass
    assert [p.requires_grad for p in adapter.parameters()].count(False) == 1
    assert not frozen.requires_grad


def test_deltas_take_the_mode_of_their_layer(tmp_path: Path) -> None:
    model, batch = build("bert"), make_batch("bert")
    adapter = attach(model, LoRA(rank=2, dropout=0.5))
    disturb(adapter)
    assert torch.equal(logits(model, batch), logits(model, batch))
    adapter.save(tmp_path / "saved")
    again = build("bert")
    load(again, tmp_path / "saved")
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("method", [Parallel(size=4), PromptTuning(length=3), PrefixTuning(length=3), LoRA(rank=2)])
def test_threads_that_serve_one_model_do_not_meet(method: LoRA) -> None:
    model, batch = build("bert"), make_batch("bert")
    disturb(attach(model, method))
    expected = logits(model, batch)
    wrong: list[object] = []

    def serve() -> None:
        try:
            wrong.extend(1 for _ in range(40) if not torch.equal(logits(model, batch), expected))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_failed_pass_leaves_nothing_behind() -> None:
    model, batch = build("bert"), make_batch("bert")
    base = logits(model, batch)
    adapter = attach(model, PromptTuning(length=10))
    answer = logits(model, batch)
    with pytest.raises(ValueError, match="Shorten the text"):
        model(**make_batch("bert", length=31))
    with adapter.disabled():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), answer)


def test_an_inactive_parallel_adapter_holds_no_tensors() -> None:
    model, batch = build("bert"), make_batch("bert")
    first = attach(model, Parallel(size=4), name="first")
    attach(model, LoRA(rank=2), name="second")
    model(**batch).loss.backward()
    assert all(delta.tap is not None and not delta.tap._inputs._values for _, _, delta in first.entries())


def test_what_is_not_in_the_model_moves_with_it() -> None:
    model, batch = build("bert"), make_batch("bert")
    first = attach(model, HeadOnly(), name="first")
    disturb(first)
    second = attach(model, HeadOnly(), name="second")
    model.to(torch.float64)
    for adapter in (first, second):
        adapter.activate()
        assert logits(model, batch).dtype == torch.float64
    with second.disabled():
        assert logits(model, batch).dtype == torch.float64


def test_another_kernel_after_attaching_keeps_the_prefix() -> None:
    model, batch = build("bert"), make_batch("bert")
    disturb(attach(model, PrefixTuning(length=3)))
    expected = logits(model, batch)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [1, 5])
def test_logits_that_a_caller_asked_for_are_not_cut(keep: int) -> None:
    model, batch = build("llama"), make_batch("llama")
    attach(model, PromptTuning(length=3))
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"]).logits
        some = model(input_ids=batch["input_ids"], logits_to_keep=keep).logits
    torch.testing.assert_close(some, whole[:, -keep:])


def test_a_tuple_of_outputs_is_refused_under_a_prompt() -> None:
    model = build("llama")
    attach(model, PromptTuning(length=3))
    with pytest.raises(ValueError, match="return_dict=True"):
        model(input_ids=torch.tensor([[5, 6]]), return_dict=False)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "gpt2"])
def test_positions_given_are_positions_counted(architecture: str) -> None:
    model = build(architecture)
    attach(model, [PromptTuning(length=3), PrefixTuning(length=2)])
    ids = make_batch(architecture, rows=2)["input_ids"][:1]
    first = 2 if architecture == "roberta" else 0
    positions = torch.arange(first, first + ids.shape[1])[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, position_ids=positions).logits, model(input_ids=ids).logits)


def test_a_prompt_after_the_first_token_refuses_left_padding() -> None:
    model = build("bert")
    attach(model, PromptTuning(length=3))
    batch = make_batch("bert")
    batch["attention_mask"][:, 0] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model(**batch)


def test_a_prompt_of_real_tokens_is_those_tokens() -> None:
    for architecture in ("llama", "gpt2"):
        model = build(architecture)
        ids, words = make_batch(architecture, rows=1)["input_ids"], torch.tensor([[7, 8, 9]])
        with torch.no_grad():
            expected = model(input_ids=torch.cat([words, ids], 1)).logits[:, 3:]
            adapter = attach(model, PromptTuning(length=3))
            adapter.deltas[0][0].rows.copy_(model.get_input_embeddings().weight[words[0]])
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_merging_beside_another_adapter_is_refused() -> None:
    model = build("bert")
    first = attach(model, LoRA(rank=2), name="first")
    attach(model, LoRA(rank=2), name="second")
    with pytest.raises(ValueError, match="Detach the other adapters before merging 'first': second"):
        first.merge()


def test_merging_into_a_tied_weight_is_refused() -> None:
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    adapter = attach(model, LoRA(rank=2, targets="lm_head"))
    with pytest.raises(ValueError, match="lm_head's weight is tied"):
        adapter.merge()


def test_decoders_are_recognised_by_attention_or_by_kind() -> None:
    from smidgen.layers import is_causal

    assert not any(is_causal(build(name)) for name in ("bert", "roberta", "distilbert"))
    assert all(is_causal(build(name)) for name in ("llama", "gpt2", "llama-classifier"))
    config = transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)
    assert is_causal(transformers.BloomForSequenceClassification(config))


def test_saving_never_deletes_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has other files, which would be lost: thesis.txt"):
        attach(build("bert"), LoRA(rank=2)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lora", {"rank": 2.0}, "LoRA's rank must be int, got 2.0"),
        ("lora", {"rank": True}, "must be int"),
        ("lora", {"alpha": float("nan")}, "alpha must be above 0"),
        ("lora", {"targets": ["query"]}, "targets must be str"),
        ("lora", {"targets": "sublayers"}, "must be linear layers"),
        ("houlsby", {"size": 0}, "size must be at least 1"),
        ("prefix-tuning", {"length": None}, "length must be int"),
        ("p-tuning", {"encoder": "cnn"}, "encoder must be one of"),
    ],
)
def test_options_are_checked_where_they_enter(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        METHODS[name](**options)


def test_a_folded_p_tuning_is_not_to_be_trained_anew() -> None:
    with pytest.raises(ValueError, match="use PromptTuning"):
        attach(build("llama"), METHODS["p-tuning"](encoder=None))


def test_the_labels_of_the_config_are_those_of_the_active_adapter(tmp_path: Path) -> None:
    model = build("bert")
    before = dict(model.config.id2label)
    for name in ("first", "second"):
        attach(model, LoRA(rank=2), name=name).save(tmp_path / name, labels=[f"{name}{index}" for index in range(3)])
        model._smidgen_adapters[name].detach()
    first, second = (load(model, tmp_path / name) for name in ("first", "second"))
    assert model.config.id2label[1] == "second1"
    first.activate()
    assert model.config.id2label[1] == "first1"
    assert model.config.label2id["first2"] == 2
    second.activate()
    assert model.config.id2label[1] == "second1"
    first.save(tmp_path / "again")  # while the second is active
    assert json.loads((tmp_path / "again" / "adapter.json").read_text())["labels"] == ["first0", "first1", "first2"]
    with first.disabled():
        assert model.config.id2label == before
    assert second.active
    second.detach()
    assert model.config.id2label == before


def test_the_thirtieth_adapter_is_no_more_work_than_the_second(tmp_path: Path) -> None:
    """Counted in calls of functions, which a slow machine does not change."""
    model = build("bert")
    calls: dict[str, list[int]] = {"attach": [], "load": [], "activate": []}

    def counted(what: str, act: Callable[[], Adapter]) -> Adapter:
        profile = cProfile.Profile()
        adapter = profile.runcall(act)
        calls[what].append(sum(entry.callcount for entry in profile.getstats()))
        return adapter

    attach(model, LoRA(rank=2), name="saved").save(tmp_path / "saved")
    for number in range(30):
        adapter = counted("attach", lambda number=number: attach(model, LoRA(rank=2), name=f"a{number}"))
        counted("load", lambda number=number: load(model, tmp_path / "saved", name=f"b{number}"))
        counted("activate", lambda adapter=adapter: adapter.activate() or adapter)
    for what, found in calls.items():
        assert found[-1] < 1.3 * found[1], what


@pytest.mark.parametrize("name", ["lora", "compacter", "p-tuning", "mam", "adalora", "full"])
def test_parameters_are_those_that_have_names(name: str) -> None:
    adapter = attach(build("bert"), example(name, "bert"))
    named, plain = [p for _, p in adapter.named_parameters()], list(adapter.parameters())
    assert list(map(id, plain)) == list(map(id, named))
