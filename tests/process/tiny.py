"""A tiny pretrained encoder and decoder as folders with their tokenizers, rows for them to learn, and their recipes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from smidgen.files import write_json
from smidgen.process.recipe import Recipe, load_recipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
MOODS = {"good": ["fine", "sunny", "sweet"], "bad": ["grim", "sour", "bleak"]}
FILLERS = ["the", "day", "was", "a", "very", "and", "so", "it", "is", "we", "all", "met", "at", "noon"]
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
VOCABULARY = [*SPECIAL, *MOODS["good"], *MOODS["bad"], *FILLERS, *COLOURS, *COLOURS.values(), "colour", "?", ":"]


def tokenizer(*, encoder: bool) -> transformers.PreTrainedTokenizerFast:
    """Words of the vocabulary; an encoder's texts stand between [CLS] and [SEP]."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]" if encoder else None, eos_token="[EOS]"
    )


def encoder(folder: Path, *, dropout: float = 0.0) -> Path:
    """A BERT without a head; `dropout` is used in hidden layers and attention."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer(encoder=True).save_pretrained(folder)
    return folder


def decoder(folder: Path) -> Path:
    """A Llama without a padding token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=4,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(encoder=False).save_pretrained(folder)
    return folder


def moods(path: Path, count: int = 60) -> Path:
    """Rows "text,label" of different lengths, each with a word that tells its label."""
    draw = random.Random(0)
    lines = ["text,label"]
    for row in range(count):
        label = draw.choice([*MOODS])
        words = [*draw.choices(FILLERS, k=draw.randint(2, 12)), draw.choice(MOODS[label]), FILLERS[row % len(FILLERS)]]
        lines.append(f"{' '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def colours(path: Path, count: int = 40) -> Path:
    """Rows "text,answer": what colour a thing has, asked in several ways."""
    draw = random.Random(0)
    lines = ["text,answer"]
    for _ in range(count):
        thing = draw.choice([*COLOURS])
        lines.append(f"{' '.join(draw.choices(FILLERS, k=draw.randint(1, 9)))} {thing},{COLOURS[thing]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(folder: Path, *, task: str = "classification", dropout: float = 0.0, **changes: Any) -> Recipe:
    """A recipe in `folder` with a tiny model and its rows, unless they are there; `changes` such as training__seed=1."""
    if not (folder / "model").is_dir():
        if task == "classification":
            encoder(folder / "model", dropout=dropout)
            moods(folder / "rows.csv")
        else:
            decoder(folder / "model")
            colours(folder / "rows.csv")
    fields: dict[str, Any] = {
        "model": "./model",
        "task": task,
        "data": {"train": "rows.csv"},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
        "output": "run",
    }
    if task == "generation":
        fields["data"]["template"] = "colour {text} ?"
    write_json(folder / "recipe.yaml", fields)
    return load_recipe(
        folder / "recipe.yaml", [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    )
