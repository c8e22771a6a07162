"""`generate` with every technique: with and without a cache, padded on the left, by beams, with every kind of cache."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from smidgen import METHODS, Method, PrefixTuning, PromptTuning, attach
from tests.conftest import DECODERS, build, example, make_batch
from tests.methods.test_contract import disturb

NEW = 6


@pytest.fixture(params=DECODERS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in METHODS if name != "head"])
def method(request: pytest.FixtureRequest, architecture: str) -> Method:
    return example(request.param, architecture)


@pytest.fixture
def model(architecture: str, method: Method) -> PreTrainedModel:
    model = build(architecture)
    disturb(attach(model, method))
    return model


@pytest.fixture
def ids(architecture: str) -> torch.Tensor:
    return make_batch(architecture, rows=2)["input_ids"][:1].repeat(2, 1)


def greedy(model: PreTrainedModel, ids: torch.Tensor, **more: object) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        **{
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            **more,
        },
    )


def test_the_result_is_the_text_and_the_new_tokens(model: PreTrainedModel, ids: torch.Tensor) -> None:
    result = greedy(model, ids)
    assert result.shape == (2, ids.shape[1] + NEW)
    assert torch.equal(result[:, : ids.shape[1]], ids)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False), result)
    named = greedy(model, ids, return_dict_in_generate=True)
    assert torch.equal(named.sequences, result)


def test_a_cache_changes_nothing(model: PreTrainedModel, ids: torch.Tensor) -> None:
    expected = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=4), expected)


def test_a_repetition_penalty_sees_the_text_s_tokens_alone(model: PreTrainedModel, ids: torch.Tensor) -> None:
    result = greedy(model, ids, repetition_penalty=3.0)
    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    text = ids
    for _ in range(NEW):
        with torch.no_grad():
            scores = penalty(text, model(input_ids=text).logits[:, -1].clone())
        scores[:, model.config.eos_token_id] = -torch.inf
        text = torch.cat([text, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(result, text)


def test_each_step_is_the_plain_forward_s_best_token(model: PreTrainedModel, ids: torch.Tensor) -> None:
    result = greedy(model, ids)
    with torch.no_grad():
        logits = model(input_ids=result[:, :-1]).logits[:, ids.shape[1] - 1 :].clone()
    logits[..., model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    assert torch.equal(logits.argmax(-1), result[:, ids.shape[1] :])


def test_padding_on_the_left_changes_nothing(model: PreTrainedModel, ids: torch.Tensor) -> None:
    expected = greedy(model, ids)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    result = greedy(model, padded, attention_mask=mask)
    assert torch.equal(result[:, 3:], expected)
    assert torch.equal(greedy(model, padded, attention_mask=None), result)


def test_beams_find_what_they_find_without_a_cache(model: PreTrainedModel, ids: torch.Tensor) -> None:
    assert torch.equal(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))


def test_max_length_counts_the_text_alone(model: PreTrainedModel, ids: torch.Tensor) -> None:
    result = model.generate(ids, max_length=ids.shape[1] + 2, min_length=ids.shape[1] + 2, do_sample=False)
    assert result.shape[1] == ids.shape[1] + 2


@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=3)], ids=["prompt", "prefix"])
def test_a_decoding_loop_of_one_s_own_is_the_uncached_forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, parts = None, []
        for column in range(ids.shape[1]):
            mask = torch.ones(2, column + 1, dtype=torch.long)
            output = model(
                input_ids=ids[:, column : column + 1], attention_mask=mask, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_a_prompt_refuses_inputs_embeds() -> None:
    model = build("llama")
    attach(model, PromptTuning(length=3))
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_the_mask_is_guessed_from_what_generate_is_given() -> None:
    model = build("llama")
    disturb(attach(model, PromptTuning(length=3)))
    model.generation_config.pad_token_id = None
    text = torch.randint(5, 60, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(text, pad_token_id=0, **settings)
    assert torch.equal(model.generate(padded, pad_token_id=0, **settings)[:, 3:], expected)
    given = GenerationConfig(pad_token_id=0, eos_token_id=2, **settings)
    assert torch.equal(model.generate(padded, given)[:, 3:], expected)


def test_a_prompt_after_the_first_token_refuses_padding_on_the_left() -> None:
    model = build("llama")
    attach(model, PromptTuning(length=3, placement="after-first"))
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(torch.randint(5, 60, (1, 4)), attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("name", ["streamer", "logits_processor", "no_repeat_ngram_size"])
def test_what_would_read_the_placeholders_is_refused(name: str) -> None:
    model = build("llama")
    adapter = attach(model, PromptTuning(length=3))
    ids = torch.randint(5, 60, (1, 4))
    value = {"streamer": object(), "logits_processor": [lambda ids, scores: scores], "no_repeat_ngram_size": 2}[name]
    with pytest.raises(ValueError, match=f"{name} would read a prompt's placeholders"):
        model.generate(ids, max_new_tokens=2, **{name: value})
    if name == "no_repeat_ngram_size":
        with adapter.disabled():
            model.generate(ids, max_new_tokens=2, no_repeat_ngram_size=2)
