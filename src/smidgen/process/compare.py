"""All techniques of a recipe on the same data with the same seeds and budget, each run in a process of its own.

A run of its own is what makes its peak memory its own, and lets a comparison go on when one technique fails. Finished
runs are kept: a comparison that was stopped goes on where it stopped, inside a run by that run's checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smidgen import __version__, files
from smidgen.errors import Interrupted, UserError
from smidgen.process.advice import advise
from smidgen.process.data import TaskData, load_data
from smidgen.process.recipe import Recipe
from smidgen.process.signals import stoppable
from smidgen.process.statistics import Scores, difference, interval
from smidgen.process.technique import TechniqueSpec
from smidgen.report.page import write_page

BASELINE = "full"
METRICS = {"classification": "accuracy", "generation": "loss"}
POLL_SECONDS = 0.3

Comparison = dict[str, Any]
Watch = Callable[[Comparison], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """One technique with one seed, in its folder."""

    spec: TechniqueSpec
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return Path(self.recipe.output)

    def metrics(self, data: TaskData) -> dict[str, Any] | None:
        """What it measured, if it ran to its end with this recipe on these rows."""
        with contextlib.suppress(UserError):
            metrics: dict[str, Any] = files.read_json(self.folder / "metrics.json")
            if metrics["recipe"] == self.recipe.fingerprint() and metrics["data"] == data.fingerprint():
                return metrics
        return None

    def progress(self) -> dict[str, Any]:
        """The last line that it logged."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            line: dict[str, Any] = json.loads((self.folder / "log.jsonl").read_text("utf-8").splitlines()[-1])
            return line
        return {}


def compare(recipe: Recipe, *, command: str, watch: Watch | None = None) -> Comparison:
    """Train every technique with every seed, and write compare.json and report.html into the recipe's output.

    Args:
        recipe: its `compare` lists the techniques, its `seeds` the seeds.
        command: how a person would run it again.
        watch: called with the comparison as it stands, a few times a second.

    Returns:
        The contents of compare.json.

    Raises:
        UserError: the data or the recipe cannot be used; nothing was run.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    data = load_data(recipe.data, recipe.task)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    comparison = _header(recipe, data, command)
    for index, spec in enumerate(recipe.compare):
        runs = [Run(spec, _own_recipe(recipe, spec, seed)) for seed in recipe.seeds]
        comparison["techniques"][index] = _row(spec, status="running")
        error = None
        for run in runs:
            if run.metrics(data) is None and error is None:
                error = _execute(run, comparison, index, watch)
        measured = [metrics for run in runs if (metrics := run.metrics(data)) is not None]
        if len(measured) < len(runs):
            comparison["techniques"][index] = _row(spec, status="failed", error=error or "The run left no result.")
        else:
            comparison["techniques"][index] = _summary(spec, measured, comparison)
        _relate(comparison, recipe, data)
        _write(comparison, output)
        if watch is not None:
            watch(comparison)
    return comparison


def _own_recipe(recipe: Recipe, spec: TechniqueSpec, seed: int) -> Recipe:
    folder = Path(recipe.output) / "runs" / f"{spec.slug}-s{seed}"
    training = recipe.training.model_copy(update={"seed": seed})
    return recipe.model_copy(
        update={"technique": spec, "training": training, "output": str(folder), "compare": (spec,), "seeds": (seed,)}
    )


def _execute(run: Run, comparison: Comparison, index: int, watch: Watch | None) -> str | None:
    """Train in a process of its own; returns what went wrong, or None."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "recipe.yaml"
    (run.folder / "metrics.json").unlink(missing_ok=True)  # of another recipe
    run.recipe.save(path)
    arguments = [sys.executable, "-m", "smidgen", "train", str(path), "--quiet"]
    if (run.folder / "checkpoint").is_dir():
        arguments.append("--resume")
    output = run.folder / "output.txt"
    with output.open("w", encoding="utf-8") as said, stoppable() as signals:
        process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        told = False
        try:
            while process.poll() is None:
                if signals and not told:
                    process.terminate()  # Ctrl-C reaches it from the terminal, a SIGTERM of ours does not
                    told = True
                if watch is not None:
                    comparison["techniques"][index]["progress"] = run.progress()
                    watch(comparison)
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()  # nothing happens to one that has ended
    if signals:
        raise Interrupted(
            f"Stopped while {run.spec.name} was training; what is finished is kept, and so is its checkpoint. "
            f"Go on with the same command: {comparison['command']}"
        )
    if process.returncode == 0:
        return None
    return _what_went_wrong(process.returncode, output.read_text("utf-8", errors="replace").strip())


def _what_went_wrong(status: int, said: str) -> str:
    """The message of a run that failed, which may have several lines; of a traceback the last line."""
    if status == -signal.SIGKILL:
        return (
            "The run was killed (SIGKILL), probably because the memory did not suffice. Lower "
            "training.micro_batch_size (the result stays the same), set training.gradient_checkpointing=true, or lower "
            "data.max_length."
        )
    if status < 0:
        return f"The run was ended by signal {-status} ({signal.strsignal(-status)})."
    _, ours, message = f"\n{said}".rpartition("\nsmidgen: ")
    if ours:
        return message
    return said.splitlines()[-1] if said else f"The run ended with status {status} and said nothing."


def _header(recipe: Recipe, data: TaskData, command: str) -> Comparison:
    import torch
    import transformers

    return {
        "version": 1,
        "title": f"{_called(recipe.model)} on {_called(recipe.data.train)}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "recipe": recipe.written(),
        "task": recipe.task,
        "metric": METRICS[recipe.task],
        "model": {"id": recipe.model, "parameters": None},
        "data": {
            "name": recipe.data.train,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "labels": list(data.labels),
            "notes": list(data.notes),
        },
        "baseline": _baseline(recipe),
        "recommended": None,
        "advice": "",
        "seeds": list(recipe.seeds),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "smidgen": __version__,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        },
        "techniques": [_row(spec, status="waiting") for spec in recipe.compare],
    }


def _baseline(recipe: Recipe) -> str:
    """The name of full fine-tuning's row, whatever options it has; the first one's, if there are several."""
    return next((spec.slug for spec in recipe.compare if spec.name == BASELINE), BASELINE)


def _called(source: str) -> str:
    """A model or a data set as people call it: the last part of its path or id."""
    return Path(source.split(":")[-1]).stem


def _row(spec: TechniqueSpec, *, status: str, error: str | None = None) -> dict[str, Any]:
    methods = spec.methods()
    summary = "; ".join(filter(None, (method.summary() for method in methods)))
    return {
        "name": spec.slug,
        "title": " + ".join(method.title for method in methods),
        "summary": summary,
        "status": status,
        "error": error,
    }


def _summary(spec: TechniqueSpec, measured: list[dict[str, Any]], comparison: Comparison) -> dict[str, Any]:
    """A technique's row from the metrics of its seeds."""
    first = measured[0]
    metric = comparison["metric"]
    comparison["model"]["parameters"] = first["base_parameters"]
    noted = comparison["data"]["notes"]
    noted += dict.fromkeys(note for metrics in measured for note in metrics.get("notes", ()) if note not in noted)
    scores = [metrics["test"][metric] for metrics in measured]
    rows, weights = _per_row(measured)
    low, high = interval(rows, weights)

    def mean(field: str) -> float:
        return float(np.mean([metrics[field] for metrics in measured]))

    return _row(spec, status="done") | {
        "summary": first["summary"],
        "score": float(np.mean(scores)),
        "low": low,
        "high": high,
        "scores": scores,
        "difference": None,
        "difference_low": None,
        "difference_high": None,
        "macro_f1": float(np.mean([m["test"]["macro_f1"] for m in measured])) if metric == "accuracy" else None,
        "trained": first["trained"],
        "share": first["trained"] / first["total"],
        "seconds": mean("seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "peak_memory_bytes": int(mean("peak_memory_bytes")),
        "disk_bytes": first["disk_bytes"],
        "curve": first["curve"],
        "confusion": first["test"].get("confusion"),
        "per_class": first["test"].get("per_class"),
    }


def _per_row(measured: list[dict[str, Any]]) -> tuple[Scores, Scores | None]:
    """(seeds, rows) of what each test row scored, and what each row counts."""
    if "predictions" in measured[0]["test"]:
        return np.array([np.equal(m["test"]["predictions"], m["test"]["targets"]) for m in measured], float), None
    return np.array([m["test"]["row_losses"] for m in measured]), np.array(measured[0]["test"]["row_tokens"], float)


def _relate(comparison: Comparison, recipe: Recipe, data: TaskData) -> None:
    """Set each technique's difference to full fine-tuning, and the advice."""
    found = {}
    for spec, row in zip(recipe.compare, comparison["techniques"], strict=True):
        if row["status"] == "done":
            runs = [Run(spec, _own_recipe(recipe, spec, seed)).metrics(data) for seed in recipe.seeds]
            found[row["name"]] = _per_row([metrics for metrics in runs if metrics is not None])
    baseline = comparison["baseline"]
    full = next((row for row in comparison["techniques"] if row["name"] == baseline and row["status"] == "done"), None)
    if full is not None:
        theirs, weights = found[baseline]
        for row in comparison["techniques"]:
            if row["status"] == "done" and row is not full:
                low, high = difference(found[row["name"]][0], theirs, weights)
                row.update(difference=row["score"] - full["score"], difference_low=low, difference_high=high)
    others = {spec.slug for spec in recipe.compare if spec.name == BASELINE} - {baseline}  # full fine-tuning as well
    choices = [row for row in comparison["techniques"] if row["name"] not in others]
    name, advice = advise(choices, comparison["metric"], baseline)
    comparison.update(recommended=name, advice=advice)


def _write(comparison: Comparison, output: Path) -> None:
    files.write_json(output / "compare.json", comparison)
    write_page(comparison, output / "report.html")


def command_line(*words: str) -> str:
    """A command as a person would type it."""
    return shlex.join(["smidgen", *words])
