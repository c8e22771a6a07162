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
from typing import TYPE_CHECKING, Any, NamedTuple

from smidgen.errors import UserError
from smidgen.process.candidates import RATES, Candidate, default_size
from smidgen.process.data import TaskData
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run, budget, steps_of
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Trainer
from smidgen.report.numbers import metric_named, size

if TYPE_CHECKING:
    import optuna

FACTOR = 3
"""Of the entries that are trained, one in so many goes on, for so many times the steps."""

RUNGS = 3
WIDTH = FACTOR ** (RUNGS - 1)
"""Entries that start together, so that one of them comes to the end."""


DRAWS = 20
"""How often an entry is drawn anew that was tried before."""


@contextlib.contextmanager
def alive(folder: Path) -> Iterator[str]:
    """A name for this process, whose lock others cannot take while it lives."""
    from filelock import FileLock

    name = secrets.token_hex(8)
    path = folder / f"{name}.lock"
    try:
        with FileLock(path):
            yield name
    finally:
        path.unlink(missing_ok=True)


class Going(NamedTuple):
    """A trial that is at work, what it trains, and the number that names its folders."""

    trial: optuna.Trial
    spec: TechniqueSpec
    number: int


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
            others = sum(not _is_gone(lock) for lock in folder.glob("*.lock") if lock.stem not in (process, "setup"))
            seed = recipe.training.seed + len(self.study.trials) + others  # not that of others, or of before a stop
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=True, group=True, constant_liar=True
            )
            self._begin()

    def _begin(self) -> None:
        """Note what is searched for, and line up the defaults; or again what failed before this start."""
        known = {"recipe": self._fingerprint(), "data": self.data.fingerprint()}
        if not self.study.user_attrs:
            for name, value in known.items():
                self.study.set_user_attr(name, value)
            for params in self._first():
                self.study.enqueue_trial(params)
        elif self.study.user_attrs != known:
            raise UserError(
                f"{self.folder} holds a search of another recipe, of other rows, or with another choose.trained or "
                "choose.memory. Remove it, or give another output."
            )
        for trial in self.trials():
            if "error" in trial.user_attrs:  # of which the cause may be gone, as it may for the runs of a comparison
                self._again(trial)

    def _fingerprint(self) -> str:
        """Of everything that changes a trial's result, or what may be tried."""
        recipe = self.recipe
        alone = [Run.of(recipe, spec, recipe.training.seed).recipe.fingerprint() for spec in recipe.compare]
        decisive = [*alone, recipe.choose.trained, recipe.choose.memory]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def _first(self) -> Iterator[dict[str, Any]]:
        """The entries that are tried first: the defaults, and then, where no rate is free, all that there are."""
        for slug, candidate in self.space.items():
            yield self._params(slug, candidate, self._default_size(candidate))
        if self._distinct() < math.inf:
            for slug, candidate in self.space.items():
                for size in candidate.sizes.keys() - {self._default_size(candidate)}:
                    yield self._params(slug, candidate, size)

    def _default_size(self, candidate: Candidate) -> int:
        """The technique's own size, or the largest that the budget allows."""
        given = default_size(candidate.spec.parts[0], candidate.option)
        return given if given in candidate.sizes else max(candidate.sizes, key=lambda size: candidate.sizes[size])

    def _params(self, slug: str, candidate: Candidate, size: int) -> dict[str, Any]:
        """An entry at its own rate, as Optuna has it."""
        chosen: dict[str, Any] = {"technique": slug}
        if candidate.rate is not None:
            chosen[f"{slug} rate"] = candidate.rate
        if len(candidate.sizes) > 1:
            chosen[f"{slug} {candidate.option}"] = size
        return chosen

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials; those that are taken up again count once, and what was drawn twice not at all."""
        trials = self.study.get_trials(deepcopy=False)
        begun = {trial.user_attrs.get("again") for trial in trials if trial.state.name != "WAITING"}
        return [trial for trial in trials if trial.number not in begun and "twin" not in trial.user_attrs]

    def is_worked_on(self) -> bool:
        """Whether other processes have trials that are not at their end."""
        import optuna
        from filelock import FileLock

        running = self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
        with FileLock(self.folder / "setup.lock"):  # whoever looks at a lock holds it for an instant
            return any(not self._is_left(trial) for trial in running)

    def _is_left(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the process that began a trial is no more."""
        return _is_gone(self.folder / f"{trial.user_attrs.get('process', '')}.lock")

    def begin(self) -> list[Going]:
        """Let entries start: a round of them, fewer if the budget has no room for it, or none.

        Those that a process left that is no more are taken up first. No other process does so meanwhile.
        """
        import optuna
        from filelock import FileLock

        states = optuna.trial.TrialState
        with FileLock(self.folder / "setup.lock"):
            for trial in self.study.get_trials(deepcopy=False, states=[states.RUNNING]):
                if self._is_left(trial):
                    self.study.tell(trial.number, state=states.FAIL)
                    self._again(trial)
            return [self._ask() for _ in range(self._width())]

    def _again(self, trial: optuna.trial.FrozenTrial) -> None:
        """Line up a trial that has ended without a score, to be taken up where it was, if it is not lined up yet."""
        if any(other.user_attrs.get("again") == trial.number for other in self.study.get_trials(deepcopy=False)):
            return
        again = {"again": trial.number, "folder": trial.user_attrs.get("folder", trial.number)}
        self.study.enqueue_trial(trial.params, user_attrs=again)

    def _width(self) -> int:
        import optuna

        states = optuna.trial.TrialState
        waiting = self.study.get_trials(deepcopy=False, states=[states.WAITING])
        again = {trial.user_attrs.get("again") for trial in waiting}
        tried = [one for one in self.trials() if one.state != states.WAITING and one.number not in again]
        left = min(self.recipe.choose.trials, self._distinct()) - len(tried)
        minutes = self.recipe.choose.minutes
        width = max(0, int(min(WIDTH, left)))
        if minutes is None or not tried:
            return width
        whole = max(trial.user_attrs.get("whole_seconds", 0.0) for trial in tried)
        if not whole:  # none says yet how long one takes: those of others may, and those that failed do not
            return 0 if any(trial.state == states.RUNNING for trial in tried) else width
        mean = RUNGS / FACTOR ** (RUNGS - 1) * whole  # of an entry, since most end early
        seconds = 60.0 * minutes
        for trial in tried:
            spent = trial.user_attrs.get("seconds", 0.0)
            seconds -= max(spent, mean) if trial.state == states.RUNNING else spent
        return min(width, max(0, int(seconds / mean)))

    def _distinct(self) -> float:
        """How many different entries there are: without end where a learning rate is free."""
        return sum(math.inf if own.rate is not None else len(own.sizes) for own in self.space.values())

    def go(self, going: list[Going]) -> None:
        """Train entries that have started, and let the best of them go on."""
        import optuna

        for rung in range(RUNGS):
            runs = [self.run(spec, rung, number) for _, spec, number in going]
            results = self.trainer.train(runs)
            scores = [
                self._score(one.trial, run, metrics, rung)
                for one, run, metrics in zip(going, runs, results, strict=True)
            ]
            still = [(one, score) for one, score in zip(going, scores, strict=True) if score is not None]
            going = []
            for one, score in still:
                if rung == RUNGS - 1:
                    self.study.tell(one.trial, score)
                elif self._is_among_best(one.trial, rung):
                    going.append(one)
                else:
                    self.study.tell(one.trial, state=optuna.trial.TrialState.PRUNED)

    def _ask(self) -> Going:
        """Begin an entry; one that was tried before is drawn anew, a few times."""
        import optuna

        going = self._drawn()
        for _ in range(DRAWS):
            entry = going.trial.user_attrs["entry"]
            known = [own.user_attrs.get("entry") for own in self.trials() if own.number != going.trial.number]
            if entry not in known:
                break
            going.trial.set_user_attr("twin", True)
            self.study.tell(going.trial, state=optuna.trial.TrialState.FAIL)
            going = self._drawn()
        return going

    def _drawn(self) -> Going:
        trial = self.study.ask()
        number = int(trial.user_attrs.get("folder", trial.number))
        trial.set_user_attr("process", self.process)
        trial.set_user_attr("folder", number)
        slug = trial.suggest_categorical("technique", list(self.space))
        candidate = self.space[slug]
        rate = chosen = None
        if candidate.rate is not None:
            low, high = (candidate.rate * factor for factor in RATES)
            rate = float(f"{trial.suggest_float(f'{slug} rate', low, high, log=True):.2g}")
        if len(candidate.sizes) > 1:
            chosen = trial.suggest_categorical(f"{slug} {candidate.option}", list(candidate.sizes))
        elif candidate.option is not None:
            chosen = next(iter(candidate.sizes))
        spec = candidate.entry(rate, chosen)
        trial.set_user_attr("entry", spec.written())
        trial.set_user_attr("trained", candidate.sizes[chosen or 0])
        return Going(trial, spec, number)

    def run(self, spec: TechniqueSpec, rung: int, number: int) -> Run:
        """An entry's run on a rung: that part of the steps, with the whole schedule.

        Args:
            spec: the entry.
            rung: from 0; the last one has all steps.
            number: of the trial, which names the folder.
        """
        training, rows = self.recipe.training, len(self.data.train)
        steps = math.ceil(steps_of(training, rows) / FACTOR ** (RUNGS - 1 - rung))
        return Run.of(
            self.recipe,
            spec,
            training.seed,
            folder=f"choose/{number:03d}-{spec.slug}-{steps}",
            changes={"training": budget(training, rows, steps=steps), "score_test": False},
        )

    def _score(self, trial: optuna.Trial, run: Run, metrics: Metrics | None, rung: int) -> float | None:
        """Note what a trial measured, and give its score; None, and the trial ends, if it failed or took too much."""
        import optuna

        most = self.recipe.choose.memory
        if metrics is None:
            trial.set_user_attr("error", self.trainer.failures[self.trainer.name_of(run)])
        else:
            trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + metrics["seconds"])
            trial.set_user_attr("whole_seconds", metrics["seconds"] * FACTOR ** (RUNGS - 1 - rung))
            trial.set_user_attr("memory", metrics["peak_memory_bytes"])
            if most is None or metrics["peak_memory_bytes"] <= most:
                point = metrics["curve"][metrics["best_epoch"] - 1]
                score, loss = float(point["validation_score"]), float(point["validation_loss"])
                trial.report(score, rung)
                trial.set_user_attr(f"rank {rung}", [-self.metric.good(score), loss])
                return score
            trial.set_user_attr("outside", f"it takes {size(metrics['peak_memory_bytes'])} of memory")
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def _is_among_best(self, trial: optuna.Trial, rung: int) -> bool:
        """Whether a trial is in the best third of all that had as many steps; of equal scores the loss decides.

        Where the smallest is looked for, those within the margin of the best are equal, and their size decides.
        """
        reached = [other.user_attrs for other in self.trials() if f"rank {rung}" in other.user_attrs]
        best = self.metric.good(-min(own[f"rank {rung}"][0] for own in reached))

        def order(own: dict[str, Any]) -> tuple[bool, float, float]:
            badness, loss = own[f"rank {rung}"]
            if self.recipe.choose.goal == "smallest":
                far = not self.metric.is_as_good(self.metric.good(-badness), best, self.recipe.study.margin)
                return far, badness if far else own["trained"], loss
            return False, badness, loss

        better = sum(order(own) < order(trial.user_attrs) for own in reached)
        return better < max(1, len(reached) // FACTOR)


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
