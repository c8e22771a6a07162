"""Scores of a generating model on the tasks of EleutherAI's lm-evaluation-harness, with its adapter and without."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.errors import UserError
from smidgen.process.job import Job
from smidgen.process.problems import unknown


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name in the harness.
        metric: likewise.
        value: with the adapter.
        error: the standard error of it; None if the harness gives none.
        base: of the base model alone; None if the adapter has changed it for good.
        base_error: the standard error of that.
    """

    task: str
    metric: str
    value: float
    error: float | None
    base: float | None
    base_error: float | None


def harness_scores(job: Job, tasks: Sequence[str], *, folder: Path | None, limit: int | None) -> list[TaskScore]:
    """Score a finished run on tasks of the harness.

    Args:
        job: a run of task=generation, opened again.
        tasks: names or groups of tasks.
        folder: of task files of one's own; None: there are none.
        limit: rows of each task; None: all.

    Raises:
        UserError: the harness is not installed, a task is not known, or the run does not generate.
    """
    if job.recipe.task != "generation":
        raise UserError(f"The harness scores models that generate text, and this run is of task={job.recipe.task}.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--harness needs the package lm-eval: pip install lm-eval.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = TaskManager(include_path=str(folder) if folder is not None else None)
    for task in tasks:
        if not known.match_tasks([task]):
            raise UserError(f"--harness {task!r} is no task of the harness.{unknown(task, known.all_tasks)}")

    def measure() -> dict[str, dict[str, Any]]:
        model = HFLM(pretrained=job.model, tokenizer=job.tokenizer, batch_size=job.recipe.training.rows_at_once)
        found: dict[str, dict[str, Any]] = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=known, limit=limit, bootstrap_iters=1000
        )["results"]
        return found

    ours, base = measure(), dict[str, dict[str, Any]]()
    if all(method.keeps_base for method in job.adapter.methods):
        with job.adapter.disabled():
            base = measure()
    return [
        TaskScore(
            task=task,
            metric=name.removesuffix(",none"),
            value=float(value),
            error=_error(scores, name),
            base=base.get(task, {}).get(name),
            base_error=_error(base.get(task, {}), name),
        )
        for task, scores in ours.items()
        for name, value in scores.items()
        if "," in name and "_stderr" not in name and isinstance(value, float | int)
    ]


def _error(scores: dict[str, Any], name: str) -> float | None:
    metric, _, kind = name.partition(",")
    with contextlib.suppress(TypeError, ValueError):  # "N/A", or none at all
        return float(scores.get(f"{metric}_stderr,{kind}"))  # type: ignore[arg-type]
    return None
