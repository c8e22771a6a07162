"""The trials of a search: which entries start, how far each goes, and who works on them, in an SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import UserError
from smidgen.process.candidates import RATES, Candidate, default_size
from smidgen.process.data import TaskData
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Trainer
from smidgen.report.numbers import metric_named

if TYPE_CHECKING:
    import optuna

FACTOR = 3
"""Of the entries that are trained, one in so many goes on, for so many times the steps."""

RUNGS = 3
WIDTH = FACTOR ** (RUNGS - 1)
"""Entries that start together, so that one of them comes to the end."""


@contextlib.contextmanager
def alive(folder: Path) -> Iterator[str]:
    """A name for this process, whose lock others cannot take while it lives."""
    from filelock import FileLock

    name = secrets.token_hex(8)
    path = folder / f"{name}.lock"
    with FileLock(path):
        yield name
    path.unlink(missing_ok=True)


class Search:
    """The trials of a search.

    Args:
        recipe: what is searched for.
        data: its rows.
        space: what may be chosen, by the entries' slugs.
        folder: where the file of the trials is.
        process: this process's name, as `alive` gives it.
        trainer: gives the results of runs.

    Raises:
        UserError: the file holds a search of another recipe or other rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TaskData,
        space: Mapping[str, Candidate],
        folder: Path,
        process: str,
        trainer: Trainer,
    ) -> None:
        import optuna
        from filelock import FileLock

        self.recipe, self.data, self.space = recipe, data, space
        self.folder, self.process, self.trainer = folder, process, trainer
        self.metric = metric_named(recipe.metric)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with FileLock(folder / "setup.lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                storage=f"sqlite:///{folder / 'trials.sqlite'}",
                study_name="choose",
                load_if_exists=True,
                direction="minimize" if self.metric.lower_is_better else "maximize",
            )
            seed = recipe.training.seed + len(self.study.trials)  # not that of another process, or of before a stop
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=True, group=True, constant_liar=True
            )
            self._begin()

    def _begin(self) -> None:
        """Note what is searched for, line up the defaults, and take up what a process left that is no more."""
        import optuna

        known = {"recipe": self._fingerprint(), "data": self.data.fingerprint()}
        if not self.study.user_attrs:
            for name, value in known.items():
                self.study.set_user_attr(name, value)
            for slug, candidate in self.space.items():
                self.study.enqueue_trial(self._defaults(slug, candidate))
        elif self.study.user_attrs != known:
            raise UserError(
                f"{self.folder} holds a search of another recipe or other rows. Remove it, or give another output."
            )
        for trial in self.study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if self._is_left(trial):
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

    def _fingerprint(self) -> str:
        fields = self.recipe.model_dump(mode="json", include={"model", "task", "data", "training", "compare"})
        fields["trained"] = self.recipe.choose.trained  # which decides about what may be chosen
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _defaults(self, slug: str, candidate: Candidate) -> dict[str, Any]:
        given = default_size(candidate.spec.parts[0], candidate.option)
        size = given if given in candidate.sizes else max(candidate.sizes)
        chosen: dict[str, Any] = {"technique": slug}
        if candidate.rate is not None:
            chosen[f"{slug} rate"] = candidate.rate
        if len(candidate.sizes) > 1:
            chosen[f"{slug} {candidate.option}"] = size
        return chosen

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials; those that were taken up again after a stop count once."""
        trials = self.study.get_trials(deepcopy=False)
        before = {trial.user_attrs.get("again") for trial in trials}
        return [trial for trial in trials if trial.number not in before]

    def is_worked_on(self) -> bool:
        """Whether other processes have trials that are not at their end."""
        import optuna

        running = self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
        return any(not self._is_left(trial) for trial in running)

    def _is_left(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the process that began a trial is no more."""
        return _is_gone(self.folder / f"{trial.user_attrs.get('process', '')}.lock")

    def width(self) -> int:
        """How many entries start next: a whole round, fewer if the budget has no room for it, or none."""
        import optuna

        states = optuna.trial.TrialState
        waiting = self.study.get_trials(deepcopy=False, states=[states.WAITING])
        tried = [trial for trial in self.trials() if trial.state != states.WAITING]
        left = self.recipe.choose.trials - len(tried)
        minutes = self.recipe.choose.minutes
        width: int = min(max(WIDTH, len(waiting)), left)
        if minutes is None or not tried:
            return max(0, width)
        seconds = 60 * minutes - sum(trial.user_attrs.get("seconds", 0.0) for trial in tried)
        whole = max((trial.user_attrs.get("whole_seconds", 0.0) for trial in tried), default=0.0)
        while width > 0 and width * RUNGS / FACTOR ** (RUNGS - 1) * whole > seconds:
            width -= 1
        return max(0, width)

    def round(self, width: int) -> None:
        """Let so many entries start, and the best of them go on."""
        import optuna

        going = [self._ask() for _ in range(width)]
        for rung in range(RUNGS):
            results = self.trainer.train([self.run(spec, rung) for _, spec in going])
            scores = [self._score(trial, metrics, rung) for (trial, _), metrics in zip(going, results, strict=True)]
            still = [(*entry, score) for entry, score in zip(going, scores, strict=True) if score is not None]
            going = []
            for trial, spec, score in still:
                if rung == RUNGS - 1:
                    self.study.tell(trial, score)
                elif self._is_among_best(trial, rung):
                    going.append((trial, spec))
                else:
                    self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def _ask(self) -> tuple[optuna.Trial, TechniqueSpec]:
        trial = self.study.ask()
        trial.set_user_attr("process", self.process)
        slug = trial.suggest_categorical("technique", list(self.space))
        candidate = self.space[slug]
        rate = size = None
        if candidate.rate is not None:
            low, high = (candidate.rate * factor for factor in RATES)
            rate = float(f"{trial.suggest_float(f'{slug} rate', low, high, log=True):.2g}")
        if len(candidate.sizes) > 1:
            size = trial.suggest_categorical(f"{slug} {candidate.option}", list(candidate.sizes))
        elif candidate.option is not None:
            size = next(iter(candidate.sizes))
        spec = candidate.entry(rate, size)
        trial.set_user_attr("entry", spec.written())
        trial.set_user_attr("trained", candidate.sizes[size or 0])
        return trial, spec

    def run(self, spec: TechniqueSpec, rung: int) -> Run:
        """An entry's run on a rung: that part of the steps, with the whole schedule.

        Args:
            spec: the entry.
            rung: from 0; the last one has all steps.
        """
        training = self.recipe.training
        batches = math.ceil(len(self.data.train) / training.batch_size)
        whole = min(batches * training.epochs, training.max_steps or batches * training.epochs)
        steps = math.ceil(whole / FACTOR ** (RUNGS - 1 - rung))
        budget = {"epochs": math.ceil(steps / batches), "max_steps": steps}
        return Run.of(
            self.recipe,
            spec,
            training.seed,
            folder=f"choose/{spec.slug}-{steps}",
            changes={"training": training.model_copy(update=budget), "score_test": False},
        )

    def _score(self, trial: optuna.Trial, metrics: Metrics | None, rung: int) -> float | None:
        """Note what a trial measured, and give its score; None, and the trial ends, if it failed or took too much."""
        import optuna

        most = self.recipe.choose.memory
        if metrics is not None:
            point = metrics["curve"][metrics["best_epoch"] - 1]
            score, loss = float(point["validation_score"]), float(point["validation_loss"])
            trial.report(score, rung)
            trial.set_user_attr(f"rank {rung}", [score if self.metric.lower_is_better else -score, loss])
            trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + metrics["seconds"])
            trial.set_user_attr("whole_seconds", metrics["seconds"] * FACTOR ** (RUNGS - 1 - rung))
            if most is None or metrics["peak_memory_bytes"] <= most:
                return score
            trial.set_user_attr("memory", metrics["peak_memory_bytes"])
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def _is_among_best(self, trial: optuna.Trial, rung: int) -> bool:
        """Whether a trial is in the best third of all that had as many steps; of equal scores the loss decides."""
        ranks = [
            other.user_attrs[key] for other in self.trials() for key in [f"rank {rung}"] if key in other.user_attrs
        ]
        better = sum(bool(rank < trial.user_attrs[f"rank {rung}"]) for rank in ranks)
        return better < max(1, len(ranks) // FACTOR)


def _is_gone(lock: Path) -> bool:
    """Whether the process that held a lock is no more."""
    from filelock import FileLock, Timeout

    if not lock.exists():
        return True
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False
