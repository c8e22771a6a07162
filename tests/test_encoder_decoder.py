"""Of an encoder-decoder the encoder reads the prompt, the decoder attends to it, and every attention takes a prefix."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from smidgen import (
    Adapter,
    HardPrompt,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    UserError,
    attach,
    load,
    rows,
    save_peft,
)
from smidgen.attention import find
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb
from tests.zoo import SIZES

Batch = dict[str, torch.Tensor]


@pytest.fixture(params=["t5", "bart"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompted(model: PreTrainedModel) -> tuple[Adapter, torch.Tensor]:
    """A prompt that was trained, and its rows."""
    adapter = attach(model, PromptTuning(length=3))
    disturb(adapter)
    return adapter, next(adapter.parameters()).detach().clone()


def by_hand(model: PreTrainedModel, learned: torch.Tensor, batch: Batch) -> Batch:
    """The batch with the prompt before it as rows of the embedding; for the model without an adapter."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = model.get_encoder().get_input_embeddings()(ids).detach()
    front = torch.ones(len(ids), len(learned), dtype=mask.dtype)
    return {
        "inputs_embeds": torch.cat([learned.expand(len(ids), -1, -1), rows], 1),
        "attention_mask": torch.cat([front, mask], 1),
    }


def test_a_prompt_is_what_rows_before_the_encoder_s_text_are(model: PreTrainedModel, batch: Batch) -> None:
    adapter, learned = prompted(model)
    with torch.no_grad():
        ours = model(**batch)
        adapter.detach()
        theirs = model(**by_hand(model, learned, batch), labels=batch["labels"])
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_an_encoder_that_knows_of_no_decoder_keeps_the_prompt_s_states() -> None:
    """Two models put together, whose encoder is by itself no encoder-decoder."""
    configs = [transformers.BertConfig(**SIZES) for _ in range(2)]
    made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs, decoder_start_token_id=1)
    model = transformers.EncoderDecoderModel(made).eval()
    batch = make_batch("bart")
    adapter, learned = prompted(model)
    answer = batch["input_ids"][:, :4]
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours = model(**text, decoder_input_ids=answer).logits
        adapter.detach()
        theirs = model(**by_hand(model, learned, batch), decoder_input_ids=answer).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attentions_that_take_no_prefix_are_named_and_not_left_out() -> None:
    config = transformers.LongT5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.LongT5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"No attention of encoder.block.0 and 1 other .* takes a prefix"):
        attach(model, PrefixTuning(length=2))


def test_a_head_that_wants_an_end_of_text_does_not_keep_prefixes_out() -> None:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_labels": 3}
    model = transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, decoder_start_token_id=0))
    adapter = attach(model, PrefixTuning(length=2))
    model(input_ids=torch.tensor([[5, 6, 1], [7, 8, 1]]), labels=torch.tensor([0, 1])).loss.backward()
    adapter.check_gradients()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_generation_is_that_from_rows_before_the_text(model: PreTrainedModel, batch: Batch, options: dict) -> None:
    adapter, learned = prompted(model)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = model.generate(**text, max_new_tokens=6, do_sample=False, **options)  # type: ignore[operator]
    adapter.detach()
    inputs = by_hand(model, learned, batch)
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)  # type: ignore[operator]
    assert torch.equal(ours, theirs)


def test_a_text_without_a_mask_and_states_that_are_given_are_served(model: PreTrainedModel, batch: Batch) -> None:
    prompted(model)
    ids = batch["input_ids"][::2]
    answer = torch.tensor([[0, 7, 8], [0, 9, 6]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=answer).logits
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=answer).logits, expected)
        states = model.get_encoder()(input_ids=ids)
        assert states.last_hidden_state.shape[1] == ids.shape[1] + 3
        given = model(encoder_outputs=states, attention_mask=torch.ones_like(ids), decoder_input_ids=answer)
        torch.testing.assert_close(given.logits, expected)


def test_rows_with_prompts_of_one_length_are_those_alone(model: PreTrainedModel, batch: Batch) -> None:
    expected = []
    for name in ("a", "b"):
        adapter = attach(model, PromptTuning(length=3), name=name)
        disturb(adapter)
        adapter.load_state({key: value + (name == "b") for key, value in adapter.state().items()})
        with torch.no_grad():
            expected.append(model(**batch).logits)
    with rows(model, ["a", "b", "b", "a"]), torch.no_grad():
        mixed = model(**batch).logits
    for row, number in enumerate([0, 1, 1, 0]):
        torch.testing.assert_close(mixed[row], expected[number][row], atol=2e-5, rtol=1e-4)


def test_every_attention_takes_a_prefix_and_layers_choose(model: PreTrainedModel) -> None:
    assert len(find(model)) == 9  # of the encoder, of the decoder, and between them
    assert len(find(model, "last:1")) == 3
    assert all(isinstance(place.layer, nn.Module) for place in find(model))


def test_a_prefix_of_zeros_takes_its_part_of_every_query_s_attention(model: PreTrainedModel, batch: Batch) -> None:
    """A key of zeros scores 0: it takes 1 / (1 + sum(exp(scores))), and the others share the rest as before."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(**batch, output_attentions=True)
    adapter = attach(model, PrefixTuning(length=1, start="random"))
    for parameter in adapter.parameters():
        parameter.data.zero_()
    model.set_attn_implementation("eager")  # as a user may at any time; ours comes back by itself
    with torch.no_grad():
        ours = model(**batch, output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions"):  # of the first layers, whose inputs are the same
        taken, left = ours[name][0][..., :1], ours[name][0][..., 1:]
        assert (taken > 0).all()
        torch.testing.assert_close(left / (1 - taken), before[name][0])
    assert all(layer.shape[-1] == 1 + batch["input_ids"].shape[1] for layer in ours.cross_attentions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method", [PromptTuning(length=3), PTuning(length=3), HardPrompt(length=3)], ids=lambda m: m.name
)
def test_prompts_go_to_peft_and_back(
    model: PreTrainedModel, batch: Batch, architecture: str, method: object, tmp_path: Path
) -> None:
    adapter = attach(model, method)  # type: ignore[arg-type]
    disturb(adapter)
    with torch.no_grad():
        expected = model(**batch).logits
        save_peft(adapter, tmp_path / "saved")
        theirs = peft.PeftModel.from_pretrained(build(architecture), tmp_path / "saved").eval()
        torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(str(tmp_path / "again"))
        back = build(architecture)
        load(back, tmp_path / "again")
        torch.testing.assert_close(back(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_puts_into_the_decoder_is_refused(model: PreTrainedModel, architecture: str, tmp_path: Path) -> None:
    for number, config in enumerate((peft.PromptTuningConfig, peft.PrefixTuningConfig)):
        there = peft.get_peft_model(build(architecture), config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
        there.save_pretrained(str(tmp_path / str(number)))
    with pytest.raises(UserError, match="a second prompt, which goes before the decoder's text"):
        load(model, tmp_path / "0")
    with pytest.raises(UserError, match="its prefix goes to the decoder alone"):
        load(model, tmp_path / "1")
    with pytest.raises(UserError, match="goes to the decoder alone, and here every attention has one"):
        save_peft(attach(model, PrefixTuning(length=2)), tmp_path / "written")


def test_prompts_beside_other_techniques_train_together(model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, [PromptTuning(length=3), PrefixTuning(length=2), LoRA(rank=2)])
    model(**batch).loss.backward()
    adapter.check_gradients()
