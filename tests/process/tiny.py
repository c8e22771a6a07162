"""A tiny model with its tokenizer, and data for it, as files: everything that a recipe names, made in a moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from smidgen.errors import UserError
from smidgen.process.opening import prepare
from smidgen.process.run import run as train
from smidgen.process.runs import Run

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *"good bad fine poor day train film book is was the a very not".split()]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def tokenizer(*, decoder: bool) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", bos_token="[CLS]"
        )
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_model(folder: Path, *, decoder: bool = False) -> Path:
    torch.manual_seed(0)
    size = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = {**size, "intermediate_size": 48, "initializer_range": 0.2, "max_position_embeddings": 48}
    if decoder:
        config = transformers.LlamaConfig(**common, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model: transformers.PreTrainedModel = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**common))
    model.save_pretrained(folder)
    tokenizer(decoder=decoder).save_pretrained(folder)
    return folder


def save_rows(path: Path, *, rows: int = 60, decoder: bool = False) -> Path:
    things = ["day", "train", "film", "book"]
    lines = ["text,answer" if decoder else "text,label"]
    for row in range(rows):
        words = f"the {things[row % 4]} {WORDS[row % 26]} {WORDS[row * 7 % 26]} is"
        good = row * 5 % 3 > 0
        extra = " very" * (row % 5)
        answer = "fine good" if good else "poor bad"
        lines.append(f"{words}{extra},{answer}" if decoder else f"{words}{extra} {answer},{'yes' if good else 'no'}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def save_spans(path: Path, *, rows: int = 60) -> Path:
    """Rows whose thing and whose judgement are spans; the judgement has two words."""
    lines = []
    for row in range(rows):
        thing, kind = ("day", "time") if row % 2 else ("film", "work")
        before, after = f"the {WORDS[row % 26]} ", " is" + " very" * (row % 4) + " "
        judgement = "fine good" if row % 3 else "poor bad"
        text = before + thing + after + judgement
        spans = [
            {"start": len(before), "end": len(before + thing), "label": kind},
            {"start": len(text) - len(judgement), "end": len(text), "label": "judgement"},
        ]
        lines.append(json.dumps({"text": text, "spans": spans}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def save_recipe(folder: Path, text: str = "", *, decoder: bool = False, spans: bool = False) -> Path:
    """A recipe with its model and data beside it: classes, answers or spans."""
    save_model(folder / "model", decoder=decoder)
    rows = save_spans(folder / "rows.jsonl") if spans else save_rows(folder / "rows.csv", decoder=decoder)
    task = "token-classification" if spans else "generation" if decoder else "classification"
    path = folder / "recipe.yaml"
    path.write_text(f"model: ./model\ntask: {task}\ndata: {{train: {rows.name}}}\noutput: out\n{text}", "utf-8")
    return path


def train_here(runs: Sequence[Run], *, ended: Callable[[Run, str | None], None], **_: object) -> list[Run]:
    """The runs as `smidgen.process.runs.execute` makes them, in this process."""
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.recipe.save(run.folder / "recipe.yaml")
        try:
            train(prepare(run.recipe), quiet=True)
        except UserError as error:
            ended(run, str(error))
        else:
            ended(run, None)
    return []
