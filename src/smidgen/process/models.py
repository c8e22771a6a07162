"""The pretrained model and its tokenizer, with the task's head, from a package, a folder or the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import patch_environment
from torch import Tensor

from smidgen import embedded
from smidgen.eight_bit import to_eight_bits
from smidgen.errors import UserError
from smidgen.layers import is_causal, position_offset
from smidgen.placeholders import IGNORED
from smidgen.process.encoding import pad_id
from smidgen.process.first_token import reading_first_token
from smidgen.process.recipe import Task
from smidgen.process.spans import tag_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES: dict[Task, str] = {
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "generation": "AutoModelForCausalLM",
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def load_model(
    source: str,
    task: Task,
    labels: tuple[str, ...],
    *,
    seed: int,
    precision: str,
    before: Callable[[PreTrainedModel, PreTrainedTokenizerBase], object] = lambda model, tokenizer: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for a task; a new head depends on the seed alone, so that every technique starts from the same one.

    Args:
        source: embedded:NAME, a folder, or a hub id.
        task: classification gets a head with a class for each of `labels`, token classification one for each tag.
        labels: the classes, or the spans' labels.
        seed: of the new head.
        precision: number format of the weights.
        before: sees the model before its weights are rounded to 8 bits.

    Raises:
        UserError: there is no such model, or it lacks what the task or the precision needs.
    """
    arguments: dict[str, Any] = {"dtype": DTYPES[precision]}
    if task != "generation":
        classes = class_names(task, labels)
        arguments["id2label"] = dict(enumerate(classes))
        arguments["label2id"] = {label: index for index, label in enumerate(classes)}
        arguments["ignore_mismatched_sizes"] = True  # a head for other classes makes way for a new one
    model, tokenizer, _ = from_pretrained(source, AUTO_CLASSES[task], task, seed=seed, **arguments)
    if precision == "int8":
        before(model, tokenizer)
        try:
            to_eight_bits(model)
        except ValueError as error:
            raise UserError(f"training.precision=int8: {error}") from error
    return model, tokenizer


def from_pretrained(
    source: str, kind: str, what: str, *, seed: int, **arguments: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str]]:
    """Load a model by an Auto class of transformers, its tokenizer, and the names of the parameters that are new.

    Args:
        source: embedded:NAME, a folder, or a hub id.
        kind: the Auto class.
        what: it is loaded for, in messages.
        seed: of what is new in it.
        arguments: of the class's from_pretrained.

    Raises:
        UserError: there is no such model, or it is not of that kind.
    """
    import transformers

    place = pretrained_folder(source)
    torch.manual_seed(seed)
    try:
        with quietly(), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):  # every process loads the weights
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            loader = getattr(transformers, kind)
            model, told = loader.from_pretrained(place, output_loading_info=True, **arguments)
    except Exception as error:  # the hub, the network, the disk and each format fail in their own ways
        raise UserError(
            f"model={source!r} cannot be loaded for {what}: {' '.join(str(error).split())} "
            "Give a folder that save_pretrained wrote, a hub id that can be reached, or embedded:minilm."
        ) from error
    model.config.pad_token_id = pad_id(tokenizer) if model.config.pad_token_id is None else model.config.pad_token_id
    return model, tokenizer, set(told["missing_keys"])


def pretrained_folder(source: str) -> str:
    """Where a model is: an embedded one's folder, or the folder or hub id itself.

    Raises:
        UserError: it is neither a model's folder nor can be a hub id.
    """
    if source in embedded.EMBEDDED and not Path(source).exists():
        raise UserError(f"model={source!r} is neither a folder nor a hub id. Did you mean 'embedded:{source}'?")
    place = str(embedded.model_folder(source.removeprefix("embedded:"))) if source.startswith("embedded:") else source
    _check_folder(place)
    return place


def class_names(task: Task, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The names of what the task's head tells apart: the labels, or the tags for them; none in generation."""
    return tag_names(labels) if task == "token-classification" else labels


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers shows no progress and no report of a head that is new, which it always is."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _check_folder(place: str) -> None:
    """Raise a UserError for a folder that is not a model's."""
    folder = Path(place)
    if not folder.is_dir():
        if folder.exists() or place.startswith(("/", ".", "~")):
            raise UserError(f"model={place!r} is not a folder with a model.")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model={place!r} has no config.json, so that it is not a model's folder.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        raise UserError(
            f"model={place!r} has no tokenizer (tokenizer.json). Copy the tokenizer's files of the model into "
            "the folder: tokenizer.save_pretrained(folder)."
        )


def kind(model: PreTrainedModel) -> Literal["encoder", "decoder"]:
    """Which of a technique's default learning rates fits the model."""
    return "decoder" if is_causal(model) else "encoder"


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that the model takes at once."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        positions -= position_offset(model)
    limits = (positions, getattr(tokenizer, "model_max_length", None), 1 << 20)
    return int(min(limit for limit in limits if limit is not None))


def logits(model: PreTrainedModel, batch: Mapping[str, Tensor], precision: str) -> Tensor:
    """What the model answers to a batch, of words only at the tokens that have a label.

    Args:
        model: on any device; the batch follows it.
        batch: `input_ids` and `attention_mask`, (rows, length), and `labels`, as `collate` gives them.
        precision: number format of the activations.

    Returns:
        (rows, classes); (rows, length, tags); or, of a vocabulary, (labels, vocabulary) in the labels' order, and
        (rows, length, vocabulary) where the model has no output embedding of its own or prompts make the text longer.
    """
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    cache = {"use_cache": False} if is_causal(model) else {}  # it is for generating
    labels = batch["labels"]
    one_answer = reading_first_token(model, inputs) if labels.dim() == 1 and not cache else _words_at(model, labels)
    with autocast(model, precision), one_answer:
        answer: Tensor = model(**inputs, **cache).logits
    return answer


@contextlib.contextmanager
def _words_at(model: PreTrainedModel, labels: Tensor) -> Iterator[None]:
    """Inside, the output embedding computes only what is compared with a label, which may be one token in ten."""
    embedding = model.get_output_embeddings()
    if embedding is None:
        yield
        return

    def keep(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        (hidden,) = inputs
        return (hidden[(labels != IGNORED).to(hidden.device)],) if hidden.shape[:2] == labels.shape else None

    handle = embedding.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def gradient_checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, activations are recomputed in the backward pass, if that is wanted."""
    # transformers 5.23 has a new name for it, and warns of the old one
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if not wanted:
        yield
        return
    getattr(model, f"{name}_enable")()
    if hasattr(model, "disable_input_require_grads"):  # else the backward pass would go down to the embeddings
        model.disable_input_require_grads()
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Inside, the model computes in this number format."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
