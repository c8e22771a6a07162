"""All techniques of a recipe on the same data with the same seeds and budget, and what follows from their numbers.

Finished runs are kept: a comparison that was stopped goes on where it stopped, inside a run by that run's checkpoint.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from smidgen import __version__, files
from smidgen.errors import Interrupted, UserError
from smidgen.process.advice import advise
from smidgen.process.data import TaskData, load_data
from smidgen.process.models import load_model
from smidgen.process.only_one import only_one
from smidgen.process.opening import attach_technique
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run, check_can_begin, check_nothing_is_lost, execute, validation_score
from smidgen.process.sources import FILES
from smidgen.process.statistics import beyond_chance, difference, interval, per_row
from smidgen.process.strict_yaml import parse
from smidgen.process.technique import TechniqueSpec
from smidgen.report.page import write_page

BASELINE = "full"

Comparison = dict[str, Any]
Watch = Callable[[Comparison], None]


def compare(recipe: Recipe, *, command: str, at_once: int = 1, watch: Watch | None = None) -> Comparison:
    """Train every technique with every seed, and write compare.json and report.html into the recipe's output.

    Args:
        recipe: its `compare` lists the techniques, its `seeds` the seeds.
        command: how a person would run it again.
        at_once: how many runs share the machine. More finish sooner, and each takes longer.
        watch: called with the comparison as it stands, a few times a second.

    Returns:
        The contents of compare.json.

    Raises:
        UserError: the data, the model or an entry cannot be used, or a comparison of another recipe or other rows is in
            the way; nothing was run.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    check_can_begin(recipe)
    with only_one(Path(recipe.output)):
        return _compare(recipe, command=command, at_once=at_once, watch=watch)


def _compare(recipe: Recipe, *, command: str, at_once: int, watch: Watch | None) -> Comparison:
    data = load_data(recipe.data, recipe.task)
    rows_used = data.fingerprint()
    _check_output(recipe, rows_used)
    comparison = _header(recipe, data, command, at_once)
    index = {spec.slug: place for place, spec in enumerate(recipe.compare)}
    runs = {spec.slug: [Run.of(recipe, spec, seed) for seed in recipe.seeds] for spec in recipe.compare}
    results = {run.folder: metrics for own in runs.values() for run in own if (metrics := run.metrics(rows_used))}
    measured: dict[str, list[Metrics]] = {}

    def settle(spec: TechniqueSpec) -> None:
        found = [results[run.folder] for run in runs[spec.slug] if run.folder in results]
        if len(found) == len(runs[spec.slug]):
            measured[spec.slug] = found
            comparison["techniques"][index[spec.slug]] = _summary(spec, recipe, found, comparison)

    def tell() -> None:
        _relate(comparison, measured)
        _write(comparison, Path(recipe.output))

    def ended(run: Run, error: str | None) -> None:
        metrics = run.metrics(rows_used)
        if error is None and metrics is None:
            error = "The run ended without results on these rows; were the data or the recipe changed meanwhile?"
        if error is not None:
            comparison["techniques"][index[run.spec.slug]] = _row(run.spec, recipe, status="failed", error=error)
        elif metrics is not None:
            results[run.folder] = metrics
            settle(run.spec)
        tell()

    def look(running: list[Run]) -> None:
        for run in running:
            row = comparison["techniques"][index[run.spec.slug]]
            if row["status"] != "failed":  # as another of its seeds did
                row.update(status="running", progress=run.progress())
        if watch is not None:
            watch(comparison)

    missing = [run for own in runs.values() for run in own if run.folder not in results]
    check_nothing_is_lost(missing)
    _check_entries(recipe, [spec for spec in recipe.compare if any(run.spec == spec for run in missing)], data)
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    for spec in recipe.compare:
        settle(spec)
    tell()
    stopped = execute(missing, at_once=at_once, ended=ended, watch=look, skip_after_failure=True)
    if stopped:
        names = ", ".join(dict.fromkeys(run.spec.name for run in stopped))
        raise Interrupted(
            f"Stopped before {names} had ended; what is finished is kept, and so are the checkpoints. "
            f"Go on with the same command: {command}"
        )
    return comparison


def _check_output(recipe: Recipe, rows_used: str) -> None:
    """Raise a UserError if a comparison of something else is there; one that was stopped or has grown goes on."""
    path = Path(recipe.output) / "compare.json"
    if not path.is_file():
        return
    there = files.read_json(path)
    try:
        earlier = Recipe.model_validate(parse(there["recipe"], str(path)))
        rows_then, version = there["data"]["fingerprint"], there["environment"]["smidgen"]
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{path} is not a comparison that smidgen {__version__} can go on with. Remove it, or give another output."
        ) from error
    changes = recipe.model_copy(update={"technique": earlier.technique}).changes(earlier)
    if rows_then != rows_used:
        changes.append("the rows of the data have changed")
    if version != __version__:
        changes.append(f"smidgen was {version} and is {__version__}")
    if changes:
        raise UserError(
            f"{path.parent} holds a comparison of another recipe ({'; '.join(changes)}). Remove it, or give another "
            "output."
        )


def _check_entries(recipe: Recipe, specs: Sequence[TechniqueSpec], data: TaskData) -> None:
    """Raise a UserError that names every technique that does not go with the model."""
    training, mistakes = recipe.training, []
    for spec in specs:  # each on a model of its own: full fine-tuning takes the one that it gets
        model, tokenizer = load_model(
            recipe.model, recipe.task, data.labels, seed=training.seed, precision=training.precision
        )
        try:
            attach_technique(spec, model, tokenizer)
        except UserError as error:
            mistakes.append(f"  {error}")
    if mistakes:
        raise UserError("\n".join(("compare holds what cannot be trained; nothing was run:", *mistakes)))


def _header(recipe: Recipe, data: TaskData, command: str, at_once: int) -> Comparison:
    import torch
    import transformers

    return {
        "version": 1,
        "title": f"{_called(recipe.model)} on {_called(recipe.data.train)}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "recipe": recipe.written(),
        "task": recipe.task,
        "metric": recipe.metric,
        "model": {"id": recipe.model, "parameters": None},
        "data": {
            "name": recipe.data.train,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "labels": list(data.labels),
            "fingerprint": data.fingerprint(),
            "notes": list(data.notes),
        },
        "baseline": baseline_of(recipe),
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
            "device": (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type,
            "runs at once": at_once,
        },
        "techniques": [_row(spec, recipe, status="waiting") for spec in recipe.compare],
    }


def baseline_of(recipe: Recipe) -> str:
    """The name of full fine-tuning's row, whatever options it has; the first one's, if there are several."""
    return next((spec.slug for spec in recipe.compare if spec.name == BASELINE), BASELINE)


def _called(source: str) -> str:
    """A model or a data set as people call it: the last part of its path or id; of bank/train.csv, bank."""
    path = Path(source.partition("@")[0].split(":")[-1])
    name = path.stem if path.suffix in FILES else path.name
    return path.parent.name or name if name == "train" else name


def _row(spec: TechniqueSpec, recipe: Recipe, *, status: str, error: str | None = None) -> dict[str, Any]:
    methods = spec.methods()
    summary = "; ".join(filter(None, (method.summary() for method in methods)))
    return {
        "name": spec.slug,
        "title": recipe.title_of(spec),
        "summary": summary,
        "status": status,
        "error": error,
    }


def _summary(
    spec: TechniqueSpec, recipe: Recipe, measured: list[dict[str, Any]], comparison: Comparison
) -> dict[str, Any]:
    """A technique's row from the metrics of its seeds."""
    first = measured[0]
    metric = comparison["metric"]
    comparison["model"]["parameters"] = first["base_parameters"]
    noted = comparison["data"]["notes"]
    noted += dict.fromkeys(note for metrics in measured for note in metrics.get("notes", ()) if note not in noted)
    scores = [metrics["test"][metric] for metrics in measured]
    low, high = interval(per_row([metrics["test"] for metrics in measured]))
    tests = [metrics["test"] for metrics in measured]

    def mean(field: str) -> float:
        return float(np.mean([metrics[field] for metrics in measured]))

    return _row(spec, recipe, status="done") | {
        "summary": first["summary"],
        "validation": float(np.mean([validation_score(metrics) for metrics in measured])),
        "score": float(np.mean(scores)),
        "low": low,
        "high": high,
        "scores": scores,
        "difference": None,
        "difference_low": None,
        "difference_high": None,
        "macro_f1": float(np.mean([test["macro_f1"] for test in tests])) if "macro_f1" in tests[0] else None,
        "trained": first["trained"],
        "share": first["trained"] / first["total"],
        "seconds": mean("seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "peak_memory_bytes": int(mean("peak_memory_bytes")),
        "disk_bytes": first["disk_bytes"],
        "curve": _mean_rows([metrics["curve"] for metrics in measured]),
        "confusion": np.sum([t["confusion"] for t in tests], axis=0).tolist() if "confusion" in tests[0] else None,
        "per_class": _mean_rows([test["per_class"] for test in tests]) if "per_class" in tests[0] else None,
    }


def _mean_rows(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One table of the seeds' tables: fractions as their means, counts and names as the first has them.

    A run that lost its patience has fewer epochs: what comes later is the mean of the others.
    """
    return [
        {
            key: float(np.mean([row[key] for row in rows])) if isinstance(value, float) else value
            for key, value in rows[0].items()
        }
        for place in range(max(map(len, tables)))
        for rows in [[table[place] for table in tables if place < len(table)]]
    ]


def _relate(comparison: Comparison, measured: Mapping[str, list[Metrics]]) -> None:
    """Set each technique's difference to full fine-tuning, and the advice."""
    baseline = comparison["baseline"]
    full = next((row for row in comparison["techniques"] if row["name"] == baseline and row["status"] == "done"), None)
    if full is not None:
        for row in comparison["techniques"]:
            if row["status"] == "done" and row is not full and row["difference"] is None:  # not yet
                ours, theirs = ([run["test"] for run in measured[name]] for name in (row["name"], baseline))
                low, high = (
                    beyond_chance(ours, theirs, comparison["metric"])
                    if len(ours) > 1
                    else difference(per_row(ours), per_row(theirs))
                )
                row.update(difference=row["score"] - full["score"], difference_low=low, difference_high=high)
    full_twice = {slug for slug, metrics in measured.items() if metrics[0]["technique"] == BASELINE} - {baseline}
    choices = [row for row in comparison["techniques"] if row["name"] not in full_twice]
    seeds = max((len(metrics) for metrics in measured.values()), default=1)
    name, advice = advise(choices, comparison["metric"], baseline, test_rows=comparison["data"]["test"], seeds=seeds)
    comparison.update(recommended=name, advice=advice)


def _write(comparison: Comparison, output: Path) -> None:
    files.write_json(output / "compare.json", comparison)
    write_page(comparison, output / "report.html")


def command_line(*words: str) -> str:
    """A command as a person would type it."""
    return shlex.join(["smidgen", *words])
