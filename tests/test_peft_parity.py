"""The same weights give the same logits as in peft: on a decoder, and on an encoder with the prompt where peft puts
it."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from transformers import PreTrainedModel

from smidgen import LoRA, PrefixTuning, PromptTuning, PTuning, attach
from tests.conftest import build, make_batch

Batch = dict[str, torch.Tensor]
LENGTH = 5


@pytest.fixture(params=["llama", "gpt2", "bert", "roberta", "llama-classifier"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_peft(architecture: str, config: peft.PeftConfig) -> peft.PeftModel:
    config.task_type = "CAUSAL_LM" if architecture in ("llama", "gpt2") else "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(architecture), config).eval()


def same_head(model: PreTrainedModel, theirs: peft.PeftModel) -> None:
    """The head that peft copied for training starts as the model's own, which ours trains in place."""
    head = {name: tensor for name, tensor in theirs.state_dict().items() if "modules_to_save.default" in name}
    for name, tensor in head.items():
        own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(model.get_parameter(own), tensor)


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def compare(model: PreTrainedModel, theirs: torch.nn.Module, batch: Batch) -> None:
    ours, expected = logits(model, batch), logits(theirs, batch)
    if expected.dim() == 3:  # peft returns the prompt's columns too
        expected = expected[:, -ours.shape[1] :]
        real = batch["attention_mask"].bool()
        ours, expected = ours[real], expected[real]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_lora(architecture: str, model: PreTrainedModel, batch: Batch) -> None:
    adapter = attach(model, LoRA(rank=4, alpha=8.0, targets="attention"))
    names = sorted({place.name.rpartition(".")[2] for place in adapter.places[0]})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[place.name for place in adapter.places[0]])
    theirs = in_peft(architecture, config)
    assert names
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                module.lora_B["default"].weight.normal_(std=0.1)
                delta = model.get_submodule(name.removeprefix("base_model.model.")).deltas.get_submodule("default:lora")
                delta.a.copy_(module.lora_A["default"].weight)
                delta.b.copy_(module.lora_B["default"].weight)
    same_head(model, theirs)
    compare(model, theirs, batch)


def test_prompt_tuning(architecture: str, model: PreTrainedModel, batch: Batch) -> None:
    theirs = in_peft(architecture, peft.PromptTuningConfig(num_virtual_tokens=LENGTH))
    if architecture == "llama-classifier":
        pytest.skip("peft passes inputs_embeds, so that the model reads its last column, which is padding")
    adapter = attach(model, PromptTuning(length=LENGTH, placement="first"))
    with torch.no_grad():
        adapter.deltas[0][0].rows.copy_(theirs.get_prompt_embedding_to_save("default"))
    compare(model, theirs, batch)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning(architecture: str, model: PreTrainedModel, batch: Batch, encoder: str) -> None:
    if architecture == "llama-classifier":
        pytest.skip("peft passes inputs_embeds, so that the model reads its last column, which is padding")
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=LENGTH, encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=24
    )
    theirs = in_peft(architecture, config)
    encoder_there = theirs.prompt_encoder["default"]
    adapter = attach(model, PTuning(length=LENGTH, encoder=encoder, hidden_size=24, placement="first"))
    delta = adapter.deltas[0][0]
    with torch.no_grad():
        delta.embedding.copy_(encoder_there.embedding.weight)
        delta.head.load_state_dict(encoder_there.mlp_head.state_dict())
        if encoder == "lstm":
            delta.lstm.load_state_dict(encoder_there.lstm_head.state_dict())
    compare(model, theirs, batch)


@pytest.mark.parametrize("hidden_size", [None, 24])
def test_prefix_tuning(architecture: str, model: PreTrainedModel, batch: Batch, hidden_size: int | None) -> None:
    theirs = in_peft(architecture, prefix_config(model, hidden_size))
    adapter = attach(model, PrefixTuning(length=LENGTH, hidden_size=hidden_size, start="random"))
    there, deltas = theirs.prompt_encoder["default"], adapter.deltas[0]
    with torch.no_grad():
        if hidden_size is None:
            heads, size = adapter.places[0][0].shape
            flat = there.embedding.weight.view(LENGTH, len(deltas), 2, heads, size)
            for index, delta in enumerate(deltas):
                delta.keys_values.copy_(flat[:, index].transpose(0, 1))
        else:
            there_out = there.transform[-1]
            trunk = deltas[0].trunk
            size = there.embedding.weight.shape[1]
            trunk.embedding[:, :size].copy_(there.embedding.weight)
            trunk.hidden.weight.zero_()
            trunk.hidden.weight[:, :size].copy_(there.transform[0].weight)
            trunk.hidden.bias.copy_(there.transform[0].bias)
            parts = zip(there_out.weight.chunk(len(deltas)), there_out.bias.chunk(len(deltas)), deltas, strict=True)
            for weight, bias, delta in parts:
                delta.out.weight.copy_(weight)
                delta.out.bias.copy_(bias)
    compare(model, theirs, batch)


def prefix_config(model: PreTrainedModel, hidden_size: int | None) -> peft.PrefixTuningConfig:
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    size = model.config.hidden_size // model.config.num_attention_heads
    return peft.PrefixTuningConfig(
        num_virtual_tokens=LENGTH,
        prefix_projection=hidden_size is not None,
        encoder_hidden_size=hidden_size,
        token_dim=heads * size,
        num_attention_heads=heads,
    )


def test_prefix_generates_what_peft_generates() -> None:
    model, batch = build("llama"), make_batch("llama", rows=2)
    theirs = in_peft("llama", prefix_config(model, None))
    adapter = attach(model, PrefixTuning(length=LENGTH, start="random"))
    heads, size = adapter.places[0][0].shape
    flat = theirs.prompt_encoder["default"].embedding.weight.view(LENGTH, -1, 2, heads, size)
    with torch.no_grad():
        for index, delta in enumerate(adapter.deltas[0]):
            delta.keys_values.copy_(flat[:, index].transpose(0, 1))
    ids = batch["input_ids"][:1]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert model.generate(**arguments).tolist() == copy.deepcopy(theirs).generate(**arguments).tolist()
