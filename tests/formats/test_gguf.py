"""A GGUF unpacked is the model that was packed."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smidgen.errors import UserError
from smidgen.formats import gguf

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BYTES = [*"!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnopqrstuvwxyz{|}~", "Ċ", "Ġ"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "ĠĠ", "ĊĊ"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def gguf_name(name: str) -> str:
    """llama.cpp's name for a parameter of transformers' Llama."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query's or key's rows in llama.cpp's order, as its converter writes them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def pack(
    model: LlamaForCausalLM,
    path: Path,
    kind: GGMLQuantizationType,
    *,
    leave_out: str = "",
    extra: str = "",
    split: str = "smollm",
) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if "q_proj" in name:
            weight = neighbours(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = neighbours(weight, config.num_key_value_heads)
        chosen = kind if weight.dim() == 2 else GGMLQuantizationType.F32
        if name != leave_out:
            writer.add_tensor(gguf_name(name), quantize(weight.numpy(), chosen), raw_dtype=chosen)
    if extra:
        writer.add_tensor(extra, numpy.zeros(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_unquantized_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = tiny_llama()
    pack(model, tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    gguf.unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(unpacked(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_a_quantized_model_gives_the_logits_that_transformers_gives_for_the_gguf(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    pack(tiny_llama(), tmp_path / "tiny.gguf", kind)
    gguf.unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_digits_are_split_off_before_the_spaces_in_front_of_them(tmp_path: Path) -> None:
    pack(tiny_llama(), tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    gguf.unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]
    assert tokenizer.decode(tokenizer("a  12\n\n3").input_ids) == "a  12\n\n3"
    assert tokenizer.decode(tokenizer("a<|im_end|>").input_ids, skip_special_tokens=True) == "a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (128, "{{ messages }}")


def test_a_tensor_that_is_missing_or_that_has_no_place_is_named(tmp_path: Path) -> None:
    pack(tiny_llama(), tmp_path / "less.gguf", GGMLQuantizationType.F32, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"less.gguf has no tensor for model.layers.1.mlp.up_proj.weight"):
        gguf.unpack(tmp_path / "less.gguf", tmp_path / "folder")
    pack(tiny_llama(), tmp_path / "more.gguf", GGMLQuantizationType.F32, extra="blk.7.attn_q.weight")
    with pytest.raises(UserError, match=r"has tensors that its model has no place for: blk.7.attn_q.weight"):
        gguf.unpack(tmp_path / "more.gguf", tmp_path / "folder")


def test_another_way_to_split_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pack(tiny_llama(), tmp_path / "split.gguf", GGMLQuantizationType.F32, split="llama-bpe")
    with pytest.raises(UserError, match=r"tokenizer of the kind \('gpt2', 'llama-bpe'\); only \('gpt2', 'smollm'\)"):
        gguf.unpack(tmp_path / "split.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
