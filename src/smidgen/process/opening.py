"""From a recipe, or the folder of a finished run, to a job that is ready: model, adapter and data put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen import files, manifest
from smidgen.adapter import Adapter
from smidgen.attaching import attach, load
from smidgen.errors import UserError
from smidgen.modes import looking
from smidgen.process import checkpoint
from smidgen.process.batches import collate
from smidgen.process.data import TaskData, load_data
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.job import Job
from smidgen.process.models import class_names, load_model, longest_text
from smidgen.process.parallel import this_process
from smidgen.process.recipe import Recipe, load_recipe
from smidgen.process.run_recipe import Precision
from smidgen.process.spans import labels_of
from smidgen.process.technique import TechniqueSpec
from smidgen.tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIED = 8
"""Training rows on which the error of weights in 8 bits is measured."""


def prepare(recipe: Recipe, *, device: torch.device | None = None) -> Job:
    """Load what a recipe names and attach its technique; nothing is written.

    Args:
        recipe: what to load.
        device: where the model goes; None: this process's accelerator, or the CPU.

    Raises:
        UserError: the data, the model or the technique cannot be used, or they do not go together.
    """
    data = load_data(recipe.data, recipe.task)
    training = recipe.training
    states: list[Tensor] = []

    def look(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        states.append(_last_states(model, tokenizer, recipe, data))

    model, tokenizer = load_model(
        recipe.model, recipe.task, data.labels, seed=training.seed, precision=training.precision, before=look
    )
    if states:
        look(model, tokenizer)
    error = float((states[1] - states[0]).norm() / states[0].norm()) if states else None
    model.to(device or this_process().device)  # type: ignore[arg-type]
    torch.manual_seed(training.seed)
    adapter = (
        attach_technique(recipe.technique, model, tokenizer)
        if recipe.start is None
        else start_from(recipe, model, data.labels)
    )
    if training.precision == "bf16":
        train_in_fp32(adapter)
    job = Job(recipe, data.labels, model, tokenizer, adapter, rounding=error)
    job.data = data
    return job


def _last_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: TaskData) -> Tensor:
    """The model's last states of the first training rows' texts, without dropout."""
    texts = [example.text for example in data.train[:TRIED]]
    most = recipe.data.max_length or longest_text(model, tokenizer)
    rows = [Encoded(ids, 0) for ids in tokenizer(texts, truncation=True, max_length=most)["input_ids"]]
    inputs = collate(rows, pad_id(tokenizer))
    with looking(model):
        states: Tensor = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    return states


def train_in_fp32(adapter: Adapter) -> None:
    """Keep what is trained in fp32: small steps are lost in bfloat16. The frozen weights take none."""
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()


def attach_technique(spec: TechniqueSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Adapter:
    """Put a recipe's technique on a model.

    Raises:
        UserError: the two do not go together.
    """
    try:
        return attach(model, spec.methods(), name=spec.slug, tokenizer=tokenizer)
    except ValueError as error:
        raise UserError(f"technique={spec.name}: {error}") from error


def start_from(recipe: Recipe, model: PreTrainedModel, labels: tuple[str, ...]) -> Adapter:
    """Put the trained adapter that a recipe starts from on a model; a head for other labels is left behind.

    Raises:
        UserError: there is none, it is for another model, or it is of another technique or other options.
    """
    path = recipe.starting_folder
    if path is None or not (path / manifest.FILE).is_file():
        raise UserError(
            f"start={recipe.start!r} holds no adapter of ours. Give the output folder of a finished run; one of "
            "peft's must be loaded and saved first."
        )
    same_head = list(class_names(recipe.task, labels)) == (manifest.read(path).labels or [])
    adapter = load(model, path, name=recipe.technique.slug, head=same_head, dtype=torch.float32)
    names = "+".join(method.name for method in adapter.methods)
    if names != recipe.technique.name:
        raise UserError(f"start={recipe.start!r} holds {names}, and the recipe trains {recipe.technique.name}.")
    for part, method in zip(recipe.technique.parts, adapter.methods, strict=True):
        for option, value in part.options.items():
            if getattr(method, option) != value:
                raise UserError(
                    f"start={recipe.start!r} holds {method.title} with {option}={getattr(method, option)!r}, and "
                    f"technique gives {option}={value!r}: training goes on with what is there, so leave it out."
                )
    return adapter


def _put_head(adapter: Adapter, path: Path) -> None:
    """Give an adapter the head of a saved one."""
    saved, own = read_tensors(path / manifest.TENSORS), dict(adapter.named_parameters())
    with torch.no_grad():
        for name in manifest.read(path).head:
            own[name].copy_(saved[name])


def reopen(folder: Path, *, precision: Precision | None = None, body: Path | None = None) -> Job:
    """Open the output folder of a finished run, its adapter loaded.

    Args:
        folder: where it is.
        precision: number format of the frozen weights; None: the one that it was trained with.
        body: another run's folder, whose adapter is put under this run's head.

    Raises:
        UserError: it is not one.
    """
    if (folder / "model").is_dir() and not (folder / "adapter").is_dir():
        raise UserError(
            f"{folder} holds a model and no adapter, as `smidgen pretrain` writes it. Fine-tune it first, by a recipe "
            f"with model: {folder / 'model'}"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the output of `smidgen train`: it has no recipe.yaml.")
    if not (folder / "metrics.json").is_file():  # an adapter there is of another run than the recipe
        raise UserError(
            f"The run in {folder} has not finished. Train it to its end: smidgen train {folder / 'recipe.yaml'}"
            + (" --resume" if checkpoint.exists(folder / "checkpoint") else "")
        )
    recipe = load_recipe(folder / "recipe.yaml", [f"training.precision={precision}"] if precision else [])
    saved = manifest.read(folder / "adapter").labels or ()
    labels = labels_of(saved) if recipe.task == "token-classification" else tuple(saved)
    model, tokenizer = load_model(
        recipe.model, recipe.task, labels, seed=recipe.training.seed, precision=recipe.training.precision
    )
    model.to(this_process().device)
    adapter = load(model, (body or folder) / "adapter", head=body is None, dtype=torch.float32)  # as it was trained
    if body is not None:
        _put_head(adapter, folder / "adapter")
    model.eval()
    trained_on = files.read_json(folder / "metrics.json").get("data")
    return Job(recipe, labels, model, tokenizer, adapter, trained_on)
