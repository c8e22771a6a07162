"""One training run, from its first step to its files: adapter/, which is what was learned, and metrics.json."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen import files, manifest
from smidgen.embedded import cache_folder
from smidgen.errors import Interrupted, UserError
from smidgen.layers import is_sharded
from smidgen.own import count
from smidgen.process import checkpoint
from smidgen.process.batches import WholeEpochs
from smidgen.process.encoding import pad_id
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.job import Job
from smidgen.process.log import check_tracker
from smidgen.process.memory import peak_memory, told_when_it_runs_out
from smidgen.process.models import class_names
from smidgen.process.only_one import only_one
from smidgen.process.opening import prepare
from smidgen.process.parallel import get_weights, this_process
from smidgen.process.progress import Progress
from smidgen.process.run_recipe import RunRecipe, read_recipe, refuse_own
from smidgen.process.scores import Scores
from smidgen.process.shelf import Shelf
from smidgen.process.train import train
from smidgen.process.words import some


def run(job: Job, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a job, keep its best epoch, score it on the test split, and write adapter/ and metrics.json.

    Args:
        job: its recipe's `output` is the folder.
        resume: whether to go on from the checkpoint there.
        quiet: whether to show no progress.

    Returns:
        The contents of metrics.json.

    Raises:
        UserError: an unfinished run is in the way, the memory does not suffice, or the loss is not finite.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    shelf = Shelf(cache_folder() / "frozen")
    job.frozen = FrozenStates(job.model, job.adapter, job.recipe.training, pad_id(job.tokenizer), shelf)
    with only_one(Path(job.recipe.output)), contextlib.closing(job.frozen):
        return _run(job, resume=resume, quiet=quiet)


def _run(job: Job, *, resume: bool, quiet: bool) -> dict[str, Any]:
    folder, is_main = Path(job.recipe.output), this_process().is_main_process
    stopped = folder / "checkpoint"
    check_start(job.recipe, resume=resume)
    known = {"recipe": job.recipe.fingerprint(), "data": job.data.fingerprint(), "text": job.recipe.text_hash()}
    check_rows(job.recipe, known, resume=resume)
    resume = begin(job.recipe, resume=resume)
    with told_when_it_runs_out():
        progress = train(
            job.model,
            job.adapter,
            WholeEpochs(job.splits["train"], job.recipe.training.batch_size, job.recipe.training.seed),
            lambda: job.score(job.splits["validation"]),
            recipe=job.recipe,
            rates=job.rates,
            pad_id=pad_id(job.tokenizer),
            fingerprint=job.fingerprint,
            frozen=job.frozen,
            probe=job.probe,
            resume=resume,
            quiet=quiet,
        )
        peak = peak_memory(job.model.device)
        try:
            scores = job.evaluate() if job.recipe.score_test else None
        except KeyboardInterrupt:
            raise Interrupted(
                "Stopped after training, while the test split was scored; a checkpoint is in "
                f"{stopped}. Go on with: smidgen train {folder / 'recipe.yaml'} --resume"
            ) from None
    kept = {name: value for name, value in (scores or {}).items() if isinstance(value, float)}
    weights = get_weights(job.adapter)
    if is_main:
        labels = class_names(job.recipe.task, job.labels) or None
        _whole(job, weights).adapter.save(folder / "adapter", metrics=kept, labels=labels)
    this_process().wait_for_everyone()
    metrics = known | _metrics(job, progress, scores, peak)
    metrics["validation"] = None if job.recipe.score_test else job.score(job.splits["validation"])
    metrics["disk_bytes"] = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    if is_main:
        files.write_json(folder / "metrics.json", metrics)
        shutil.rmtree(stopped, ignore_errors=True)
    this_process().wait_for_everyone()
    return metrics


def check_start(recipe: RunRecipe, *, resume: bool) -> None:
    """Raise a UserError if the folder cannot be written or holds a run that would be lost, or a package is missing."""
    check_tracker(recipe.training)
    folder = Path(recipe.output)
    stopped = folder / "checkpoint"
    if checkpoint.exists(stopped) and not resume:
        raise UserError(
            f"{folder} holds an unfinished run. Add --resume to go on with it, remove {stopped} to start again, or "
            "give another output."
        )
    if resume and (folder / "metrics.json").is_file() and not checkpoint.exists(stopped):
        raise UserError(f"The run in {folder} is finished; there is nothing left to resume.")
    if resume and not stopped.is_dir():
        raise UserError(f"There is no checkpoint to resume in {folder}. Train without --resume.")
    refuse_own(folder / "recipe.yaml")
    if (folder / "compare.json").is_file():
        raise UserError(f"{folder} holds a comparison. Give another output.")
    if (folder / "metrics.json").is_file() and not resume:
        finished = files.read_json(folder / "metrics.json")
        if not isinstance(finished, dict) or finished.get("recipe") != recipe.fingerprint():
            changes = some(_changes(recipe, folder / "recipe.yaml"), 3)
            raise UserError(
                f"{folder} holds a finished run of another recipe{changes and f' ({changes})'}. Add --set "
                "output=runs/NAME to keep it, or remove it."
            )
    files.check_replaceable(folder / "adapter", {manifest.FILE, manifest.TENSORS})
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output={recipe.output!r} cannot be written: {existing} is no folder that takes files.")


def check_rows(recipe: RunRecipe, known: Mapping[str, str | None], *, resume: bool) -> None:
    """Raise a UserError if the output folder holds a finished run of other rows or texts, which would be lost.

    Args:
        recipe: whose output it is.
        known: the hashes of the `data` and the `text` of now.
        resume: whether a run goes on, which is not finished.
    """
    folder = Path(recipe.output)
    if resume or not (folder / "metrics.json").is_file():
        return
    finished = files.read_json(folder / "metrics.json")
    for name, what in (
        ("data", "of other rows: the data have"),
        ("text", f"with another text: {recipe.texts_field} has"),
    ):
        if finished.get(name) != known[name]:
            raise UserError(
                f"{folder} holds a finished run {what} changed since. Add --set output=runs/NAME to keep it, or remove "
                "it."
            )


def _changes(recipe: RunRecipe, path: Path) -> list[str]:
    """What the recipe of a finished run says otherwise; none if that cannot be read."""
    with contextlib.suppress(UserError):
        return recipe.changes(read_recipe(type(recipe), path, [], lambda fields: fields))
    return []


def begin(recipe: RunRecipe, *, resume: bool) -> bool:
    """Put the recipe into the output folder of a run that does not go on; whether there is something to go on from."""
    folder = Path(recipe.output)
    stopped = folder / "checkpoint"
    resume = resume and (checkpoint.exists(stopped) or not stopped.is_dir())  # stopped in its first checkpoint
    if this_process().is_main_process and not resume:
        (folder / "metrics.json").unlink(missing_ok=True)
        recipe.save(folder / "recipe.yaml")
    return resume


def _whole(job: Job, weights: dict[str, Tensor]) -> Job:
    """The job with nothing sharded, so that one process alone can save it: loaded once more, on the CPU."""
    if not is_sharded(job.model):
        return job
    whole = prepare(job.recipe, device=torch.device("cpu"))
    whole.adapter.load_state(weights)
    return whole


def _metrics(job: Job, progress: Progress, scores: Scores | None, peak: int) -> dict[str, Any]:
    return {
        "technique": job.recipe.technique.name,
        "summary": job.summary,
        "seed": job.recipe.training.seed,
        "notes": job.notes,
        "test": scores,
        "best_epoch": progress.best_epoch + 1,
        "curve": progress.curve,
        "probe": None
        if progress.probe_loss is None
        else {"before": progress.probe_loss, "after": progress.curve[progress.best_epoch]["probe_loss"]},
        "trained": job.adapter.trainable,
        "total": job.adapter.total,
        "base_parameters": count(job.model),
        "seconds": progress.seconds,
        "frozen_blocks": 0 if job.frozen is None else job.frozen.depth,
        "steps": progress.step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak,
    }
