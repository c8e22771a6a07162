"""Forgetting: what a model still knows after it has learned something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smidgen import files, manifest
from smidgen.errors import UserError
from smidgen.process.compare import baseline_of
from smidgen.process.data import TaskData
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.models import load_model
from smidgen.process.opening import reopen
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run
from smidgen.process.studies.checks import check_tasks
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Trainer, titles_of
from smidgen.process.words import listed
from smidgen.report import numbers
from smidgen.report.numbers import Metric, metric_named

DISABLED = {True: "the base model, to the bit", False: "the base model is lost"}

ROWS = 8
"""Of the test split, on which a disabled adapter is compared with the base model."""

WHATEVER = 1e9
"""A rise that no loss has."""

FIRST = "first"
"""The name of the recipe's own task in a sequence of tasks."""


def study_forgetting(recipe: Recipe, data: TaskData, trainer: Trainer) -> Finding:
    """Of generation, the loss of general text before and after; of other tasks, scores of tasks learned earlier.

    Raises:
        UserError: the recipe has neither `probe` nor `study.tasks`.
    """
    if recipe.task == "generation":
        if recipe.probe is None:
            raise UserError(
                "probe is not given: name text of the kind that the model should go on to know in probe.text."
            )
        return _of_text(recipe, trainer)
    if not recipe.study.tasks:
        raise UserError(
            "study.tasks is empty: name the data of other tasks that are learned after this one, such as "
            "{topics: {train: topics.csv}}."
        )
    return _of_tasks(recipe, trainer, check_tasks(recipe, data))


def _of_text(recipe: Recipe, trainer: Trainer) -> Finding:
    titles, metric = titles_of(recipe), metric_named(recipe.metric)
    unguarded = {"probe": recipe.probe and recipe.probe.model_copy(update={"rise": WHATEVER})}
    runs = {
        spec.slug: [
            Run.of(recipe, spec, seed, folder=f"unguarded/{spec.slug}-s{seed}", changes=unguarded)
            for seed in recipe.seeds
        ]
        for spec in recipe.compare
    }
    measured = trainer.train_each(runs)
    keeper = _Kept(Path(recipe.output) / "study" / "forgetting-scores.json")
    untouched = {name: all(keeper.is_untouched(run) for run in runs[name]) for name in measured}
    rows: list[dict[str, Any]] = [
        {
            "technique": name,
            "before": [run["probe"]["before"] for run in found],
            "after": [run["probe"]["after"] for run in found],
            "scores": [run["test"][recipe.metric] for run in found],
        }
        for name, found in measured.items()
    ]
    rises = {row["technique"]: float(np.mean(_rises(row))) for row in rows}
    told = [f"{titles[name]} {numbers.signed(100 * rise, 1)} %" for name, rise in rises.items()]
    return Finding(
        title="What is forgotten?",
        answer=f"The loss of general text changes by: {listed(told)}." if told else "No technique ran to its end.",
        headings=("Technique", f"Test {metric.word}", "General text before", "after", "change, %", "Disabled"),
        table=[
            (
                titles[row["technique"]],
                metric.score(float(np.mean(row["scores"]))),
                f"{np.mean(row['before']):.3f}",
                f"{np.mean(row['after']):.3f}",
                numbers.signed(100 * rises[row["technique"]], 1),
                DISABLED[untouched[row["technique"]]],
            )
            for row in rows
        ],
        chart=Chart(
            kind="intervals",
            title="Change of general text's loss; each seed's lowest and highest",
            across="Change of the loss, %",
            up="",
            lines=[Line(row["technique"], titles[row["technique"]], [_change(_rises(row))]) for row in rows],
            marks=(0.0,),
            baseline=baseline_of(recipe),
        ),
        notes=(
            "General text is probe.text, in blocks, with the adapter active; probe.rise guards nothing here. Disabled: "
            "whether the model's hidden states are then the base model's, bit by bit, on some test rows.",
        ),
        rows=rows,
    )


def _rises(row: Mapping[str, Any]) -> list[float]:
    """How much the loss of general text rose with each seed, as a part of what it was."""
    return [after / before - 1 for before, after in zip(row["before"], row["after"], strict=True)]


def _change(rises: Sequence[float]) -> Point:
    changes = [100 * rise for rise in rises]
    return Point(0, float(np.mean(changes)), min(changes), max(changes))


def _of_tasks(recipe: Recipe, trainer: Trainer, notes: tuple[str, ...]) -> Finding:
    """One adapter learns the recipe's task and then the others, each with a head of its own."""
    names = [FIRST, *recipe.study.tasks]
    sequences: dict[str, list[list[Run]]] = {}
    for spec in recipe.compare:
        for seed in recipe.seeds:
            sequences.setdefault(spec.slug, []).append(_sequence(recipe, spec, seed))
    learned: dict[str, list[list[Metrics]]] = {name: [[] for _ in own] for name, own in sequences.items()}
    for stage in range(len(names)):  # a task starts from the one before
        going = [
            (learned[name][place], own[stage])
            for name, runs in sequences.items()
            for place, own in enumerate(runs)
            if len(learned[name][place]) == stage
        ]
        for (own, _), metrics in zip(going, trainer.train([run for _, run in going]), strict=True):
            own += [metrics] if metrics is not None else []
    whole = {name: own for name, own in sequences.items() if all(len(found) == len(names) for found in learned[name])}
    keeper = _Kept(Path(recipe.output) / "study" / "forgetting-scores.json")
    rows = [
        _row(name, [_matrix(runs, keeper) for runs in own], [keeper.is_untouched(runs[-1]) for runs in own])
        for name, own in whole.items()
    ]
    metric, titles = metric_named(recipe.metric), titles_of(recipe)
    return Finding(
        title="What is forgotten?",
        answer=_answer(rows, titles, metric),
        headings=("Technique", "Right after learning", f"After {len(names)} tasks", "Forgotten", "Disabled"),
        table=[
            (
                titles[row["technique"]],
                metric.score(row["learned"]),
                metric.score(row["kept"]),
                metric.difference(row["learned"] - row["kept"]),
                DISABLED[row["untouched"]],
            )
            for row in rows
        ],
        chart=Chart(
            kind="lines",
            title=f"{metric.title} on the first task while others are learned",
            across="Tasks learned",
            up=metric.heading,
            shortest=metric.shortest_axis,
            lines=[
                Line(
                    row["technique"],
                    titles[row["technique"]],
                    [Point(place + 1, metric.shown(value)) for place, value in enumerate(row["first"])],
                )
                for row in rows
            ],
            baseline=baseline_of(recipe),
        ),
        notes=(
            f"One adapter learns {len(names)} tasks one after the other ({', '.join(names)}), each with a head of its "
            "own; then every earlier task is scored again with its head. Forgotten is the mean over the earlier tasks. "
            "With one adapter a task nothing can be forgotten as long as the base model is as it was, which is "
            "compared bit by bit with the last adapter disabled.",
            *notes,
        ),
        rows=rows,
    )


def _sequence(recipe: Recipe, spec: TechniqueSpec, seed: int) -> list[Run]:
    runs = [Run.of(recipe, spec, seed)]
    for place, (name, data) in enumerate(recipe.study.tasks.items(), 2):
        changes: dict[str, Any] = {"data": data, "start": str(runs[-1].folder)}
        folder = f"sequence/{spec.slug}-s{seed}-{place}-{name}"
        runs.append(Run.of(recipe, spec, seed, folder=folder, changes=changes))
    return runs


def _matrix(runs: Sequence[Run], keeper: _Kept) -> list[list[float]]:
    """After each task (a row) the scores of the tasks so far."""
    return [[keeper.score(runs[task], runs[last]) for task in range(last + 1)] for last in range(len(runs))]


def _row(name: str, matrices: Sequence[list[list[float]]], untouched: Sequence[bool]) -> dict[str, Any]:
    """The means over the seeds: of the earlier tasks' scores right after they were learned, and after all."""
    last = len(matrices[0]) - 1
    return {
        "technique": name,
        "learned": float(np.mean([[matrix[task][task] for task in range(last)] for matrix in matrices])),
        "kept": float(np.mean([matrix[last][:last] for matrix in matrices])),
        "first": [float(np.mean([matrix[stage][0] for matrix in matrices])) for stage in range(last + 1)],
        "untouched": all(untouched),
        "matrices": list(matrices),
    }


class _Kept:
    """Scores that take a while, kept in a file by what they are of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = files.read_json(path) if path.is_file() else {}

    def score(self, task: Run, last: Run) -> float:
        """The score of a run's task with its own head, on the adapter as a later run has left it."""
        metric = task.recipe.metric
        if task is last:
            return float(files.read_json(task.folder / "metrics.json")["test"][metric])
        return float(
            self._once(f"{_hash(task)} {_hash(last)}", lambda: reopen(task.folder, body=last.folder).evaluate()[metric])
        )

    def is_untouched(self, last: Run) -> bool:
        """Whether the base model answers as it did before, bit by bit, when a run's adapter is disabled."""
        return bool(self._once(f"base {_hash(last)}", lambda: _is_untouched(last)))

    def _once(self, key: str, measure: Any) -> Any:
        if key not in self.values:
            self.values[key] = measure()
            files.write_json(self.path, self.values)
        return self.values[key]


def _hash(run: Run) -> str:
    return manifest.hash_of(run.folder / "adapter")


def _is_untouched(run: Run) -> bool:
    job = reopen(run.folder)
    if not all(method.keeps_base for method in job.adapter.methods):
        return False
    training = job.recipe.training
    base, _ = load_model(
        job.recipe.model, job.recipe.task, job.labels, seed=training.seed, precision=training.precision
    )
    base.to(job.model.device).eval()  # type: ignore[arg-type]
    with torch.no_grad(), job.adapter.disabled():
        for row in job.splits["test"][:ROWS]:
            tokens = torch.tensor([row.input_ids], device=job.model.device)
            if not torch.equal(job.model.base_model(tokens)[0], base.base_model(tokens)[0]):
                return False
    return True


def _answer(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str], metric: Metric) -> str:
    if not rows:
        return "No technique ran to its end."
    told = [
        f"{titles[row['technique']]} {metric.score(row['kept'])} of {metric.score(row['learned'])}{metric.unit}"
        for row in rows
    ]
    intact = [titles[row["technique"]] for row in rows if row["untouched"]]
    leave = "leaves" if len(intact) == 1 else "leave"
    ending = (
        f" With one adapter a task nothing is forgotten: disabled, {listed(intact)} {leave} the base model's answers "
        "to the bit."
        if intact
        else ""
    )
    return f"What an adapter that goes on learning keeps of {metric.word} on earlier tasks: {listed(told)}.{ending}"
