"""Tiny models of many architectures and tasks, built from configurations, and a batch for each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY, LABELS = 60, 3

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def _of(name: str, kind: str, **more: Any) -> Callable[[], PreTrainedModel]:
    """A tiny NAMEForKIND of transformers."""
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}For{kind}")
    return lambda: model(config(**{**SIZES, **more}))


GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "electra": _of("Electra", "SequenceClassification", embedding_size=32, num_labels=LABELS),
    "modernbert": _of("ModernBert", "SequenceClassification", num_labels=LABELS, local_attention=8),
    "deberta": _of(
        "DebertaV2",
        "SequenceClassification",
        num_labels=LABELS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    ),
    "bert-tokens": _of("Bert", "TokenClassification", num_labels=LABELS),
    "bert-answers": _of("Bert", "QuestionAnswering"),
    "bert-gaps": _of("Bert", "MaskedLM"),
    "qwen3": _of("Qwen3", "CausalLM", **GROUPED),
    "gemma2": _of("Gemma2", "CausalLM", **GROUPED),
    "phi3": _of("Phi3", "CausalLM", num_key_value_heads=2),
    "gpt-neox": _of("GPTNeoX", "CausalLM"),
    "opt": _of("OPT", "CausalLM", ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
    "t5": _of(
        "T5", "ConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    ),
    "bart": _of(
        "Bart",
        "ConditionalGeneration",
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_start_token_id=2,
        init_std=0.2,
    ),
    "vit": _of("ViT", "ImageClassification", image_size=16, patch_size=8, num_labels=LABELS),
    "mixtral": _of("Mixtral", "CausalLM", num_key_value_heads=2, num_local_experts=4),
    "qwen3-moe": _of("Qwen3Moe", "CausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **GROUPED),
}


@functools.cache
def _state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return ZOO[name]().state_dict()


def build(name: str) -> PreTrainedModel:
    """A tiny model, the same each time, in evaluation mode."""
    model = ZOO[name]()
    model.load_state_dict(_state(name))
    return model.eval()


def make_batch(name: str) -> dict[str, torch.Tensor]:
    """Four rows of the model's input, with padding on the right of two of them, and labels of its task."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1, 2, 0])}
    ids = torch.randint(5, VOCABULARY, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -3:] = 0
    ids[mask == 0] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert-answers":
        return {**batch, "start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 3, 4, 5])}
    if name in ("electra", "modernbert", "deberta"):
        return {**batch, "labels": torch.tensor([0, 1, 2, 0])}
    if name == "bert-tokens":
        return {**batch, "labels": torch.randint(0, LABELS, (4, 9), generator=generator)}
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)}
