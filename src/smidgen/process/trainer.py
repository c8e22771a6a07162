"""The runs of a study: those that are finished are read, the others are trained, and what failed is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen.errors import Interrupted
from smidgen.process.data import load_data
from smidgen.process.recipe import DataConfig, Recipe
from smidgen.process.runs import Metrics, Run, check_nothing_is_lost, execute, validation_score
from smidgen.report.numbers import duration, metric_named

Tell = Callable[[str], object]


class Trainer:
    """Gives the results of runs.

    Args:
        recipe: that the runs are variants of.
        command: how a person would go on after Ctrl-C.
        at_once: how many runs share the machine.
        tell: hears of each run that ended, a line each.
    """

    def __init__(self, recipe: Recipe, *, command: str, at_once: int, tell: Tell) -> None:
        self.recipe, self.command, self.at_once, self.tell = recipe, command, at_once, tell
        self.failures: dict[str, str] = {}
        self._rows: dict[DataConfig, str] = {}

    def train(self, runs: Sequence[Run]) -> list[Metrics | None]:
        """What each run measured, in their order; None for one that failed.

        Raises:
            UserError: the rows of one cannot be read, or a run of another recipe would be lost; nothing was run.
            Interrupted: Ctrl-C; what is finished is kept, and so are the checkpoints.
        """
        found = {run.folder: self._metrics(run) for run in runs}
        missing = list({run.folder: run for run in runs if found[run.folder] is None}.values())
        check_nothing_is_lost(missing)
        done, began = 0, time.monotonic()

        def ended(run: Run, error: str | None) -> None:
            nonlocal done
            done += 1
            metrics = found[run.folder] = self._metrics(run) if error is None else None
            if metrics is None:
                self.failures[self.name_of(run)] = error or "the run ended without results on these rows"
            left = (time.monotonic() - began) / done * (len(missing) - done)
            more = f", about {duration(left)} left" if left else ""
            self.tell(f"{done} of {len(missing)}: {self.name_of(run)}: {self._told(run, metrics)}{more}")

        if execute(missing, at_once=self.at_once, ended=ended, watch=lambda running: None):
            raise Interrupted(
                "Stopped; what is finished is kept, and so are the checkpoints. "
                f"Go on with the same command: {self.command}"
            )
        return [found[run.folder] for run in runs]

    def train_each(self, runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Metrics]]:
        """The same for groups of runs; a group of which one failed is left out."""
        results = iter(self.train([run for own in runs.values() for run in own]))
        groups = {name: [next(results) for _ in own] for name, own in runs.items()}
        return {
            name: [metrics for metrics in own if metrics is not None] for name, own in groups.items() if None not in own
        }

    def train_compared(self) -> dict[str, list[Metrics]]:
        """Of each technique that the recipe compares, the results of its seeds: the runs of `smidgen compare`."""
        recipe = self.recipe
        return self.train_each(
            {spec.slug: [Run.of(recipe, spec, seed) for seed in recipe.seeds] for spec in recipe.compare}
        )

    def name_of(self, run: Run) -> str:
        """A run's folder, as one finds it in the recipe's output."""
        return run.folder.relative_to(Path(self.recipe.output)).as_posix()

    def _metrics(self, run: Run) -> Metrics | None:
        data = run.recipe.data
        if data not in self._rows:
            self._rows[data] = load_data(data, run.recipe.task).fingerprint()
        return run.metrics(self._rows[data])

    def _told(self, run: Run, metrics: Metrics | None) -> str:
        if metrics is None:
            return f"failed: {self.failures[self.name_of(run)]}"
        metric = metric_named(run.recipe.metric)
        if metrics["test"] is None:
            return f"validation {metric.word} {metric.score(validation_score(metrics))}{metric.unit}"
        return f"{metric.word} {metric.score(metrics['test'][run.recipe.metric])}{metric.unit}"


def titles_of(recipe: Recipe) -> dict[str, str]:
    """The techniques' names for people, by their slugs."""
    return {spec.slug: recipe.title_of(spec) for spec in recipe.compare}


def scores_of(found: Sequence[Metrics], metric: str) -> list[Any]:
    """The test scores of runs."""
    return [metrics["test"][metric] for metrics in found]
