"""Cost: what each technique trains, holds, takes and stores beside full fine-tuning, and whether `plan` said so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.data import TaskData
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run, share_of_cores, what_went_wrong
from smidgen.process.studies.checks import needs_full
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Trainer, titles_of
from smidgen.process.words import listed
from smidgen.report import numbers

TASKS = 10
"""For how many tasks the disk is counted."""

CLOSE = 0.15
"""How far a plan may be from what is measured."""


def study_cost(recipe: Recipe, data: TaskData, trainer: Trainer) -> Finding:
    """The costs of the runs of `smidgen compare`, beside what smidgen plan says before them.

    Raises:
        UserError: there is no full fine-tuning to compare with, or a technique cannot be planned.
    """
    full = needs_full(recipe)
    measured, titles = trainer.train_compared(), titles_of(recipe)
    rows = []
    for spec in recipe.compare:
        if spec.slug in measured:
            plan = _plan(Run.of(recipe, spec, recipe.seeds[0]), data, trainer)
            rows += [_row(spec, measured[spec.slug], plan)] if plan is not None else []
    base = next((row for row in rows if row["technique"] == full), None)
    return Finding(
        title="What does it cost?",
        answer=_answer(rows, base, titles),
        headings=(
            "Technique",
            "Trained",
            "Optimizer",
            "Activations",
            "Memory",
            "planned",
            "Time",
            "planned",
            f"{TASKS} tasks on disk",
        ),
        table=[
            (
                titles[row["technique"]],
                numbers.percent(row["trained"] / row["total"]),
                numbers.size(row["optimizer_bytes"]),
                numbers.size(row["activation_bytes"]),
                numbers.size(row["memory_bytes"]),
                _off(row["planned_memory_bytes"], row["memory_bytes"]),
                numbers.duration(row["seconds"]),
                _off(row["planned_seconds"], row["seconds"]),
                numbers.size(row["tasks_bytes"]),
            )
            for row in rows
        ],
        chart=Chart(
            kind="intervals",
            title=f"Planned time over measured time; the band is {100 * CLOSE:.0f} % to either side",
            across="Planned over measured, %",
            up="",
            lines=[
                Line(
                    row["technique"],
                    titles[row["technique"]],
                    [Point(0, 100 * row["planned_seconds"] / row["seconds"])],
                )
                for row in rows
            ],
            marks=(100 - 100 * CLOSE, 100, 100 + 100 * CLOSE),
            baseline=full,
        ),
        notes=(
            "Time is that of the training steps, without evaluation; memory is the peak of the whole process, the mean "
            "of the seeds. Optimizer and activations are those of a step on the longest batch: AdamW's two moments, "
            "and what is kept for the backward pass beside the weights. Planned is what smidgen plan says from some "
            f"steps that it tries, and how far off it is. {TASKS} tasks take the base model once and an adapter for "
            "each; of what changes the base itself, a model for each.",
        ),
        rows=rows,
    )


def _plan(run: Run, data: TaskData, trainer: Trainer) -> dict[str, Any] | None:
    """What smidgen plan says of a run, in a process of its own as a user has it; None if it fails."""
    path = run.folder / "plan.json"
    known = {"recipe": run.recipe.fingerprint(), "data": data.fingerprint(), "at_once": trainer.at_once}
    try:
        return files.once(path, known, lambda: _planned(run, trainer.at_once))
    except UserError as error:
        trainer.failures[f"plan of {trainer.name_of(run)}"] = str(error)
        return None


def _planned(run: Run, at_once: int) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "smidgen", "plan", str(run.folder / "recipe.yaml"), "--json"],
        capture_output=True,
        text=True,
        env=share_of_cores(at_once) | os.environ,
    )
    if ended.returncode:
        raise UserError(what_went_wrong(ended.returncode, ended.stderr.strip()))
    planned: dict[str, Any] = json.loads(ended.stdout)
    return planned


def _row(spec: TechniqueSpec, found: Sequence[Metrics], plan: dict[str, Any]) -> dict[str, Any]:
    first = found[0]
    base = 4 * first["base_parameters"] if all(method.keeps_base for method in spec.methods()) else 0
    return {
        "technique": spec.slug,
        "trained": first["trained"],
        "total": first["total"],
        "optimizer_bytes": plan["optimizer_bytes"],
        "activation_bytes": plan["activation_bytes"],
        "memory_bytes": int(np.mean([run["peak_memory_bytes"] for run in found])),
        "planned_memory_bytes": plan["memory_bytes"],
        "seconds": float(np.mean([run["seconds"] for run in found])),
        "planned_seconds": plan["seconds"],
        "disk_bytes": first["disk_bytes"],
        "tasks_bytes": base + TASKS * first["disk_bytes"],
    }


def _off(planned: float, measured: float) -> str:
    return f"{numbers.signed(100 * (planned / measured - 1), 0)} %"


def _between(values: Sequence[float], written: Callable[[float], str]) -> str:
    """The least and the most: 0.5 % to 2 %."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def _answer(rows: Sequence[dict[str, Any]], base: dict[str, Any] | None, titles: dict[str, str]) -> str:
    if not rows:
        return "No technique ran to its end."
    others = [row for row in rows if row is not base]
    sentences = []
    if base is not None and others:
        shares = [row["trained"] / row["total"] for row in others]
        parts = [
            f"{_between(shares, numbers.percent)} of the parameters",
            f"{_between([row['seconds'] / base['seconds'] for row in others], numbers.percent)} of the time",
            f"{_between([row['memory_bytes'] / base['memory_bytes'] for row in others], numbers.percent)} of the "
            "memory",
        ]
        names = titles[others[0]["technique"]] if len(others) == 1 else f"{len(others)} techniques"
        disk = _between([row["tasks_bytes"] for row in others], numbers.size)
        sentences.append(
            f"Beside full fine-tuning, {names} {'takes' if len(others) == 1 else 'take'} {listed(parts)}; {TASKS} "
            f"tasks take {disk} instead of {numbers.size(base['tasks_bytes'])}."
        )
    for what, planned in (("seconds", "planned_seconds"), ("memory_bytes", "planned_memory_bytes")):
        far = [titles[row["technique"]] for row in rows if abs(row[planned] / row[what] - 1) > CLOSE]
        word = "time" if what == "seconds" else "memory"
        sentences.append(
            f"The planned {word} was within {100 * CLOSE:.0f} % of the measured one for {len(rows) - len(far)} of "
            f"{len(rows)} techniques{f', not for {listed(far)}' if far else ''}."
        )
    return " ".join(sentences)
