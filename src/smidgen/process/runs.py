"""Training runs as processes: each has its peak memory to itself, and none takes the others down when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.log import check_tracker
from smidgen.process.recipe import Recipe
from smidgen.process.run_recipe import NOT_IN_RESULT, TrainingConfig
from smidgen.process.signals import stoppable
from smidgen.process.technique import TechniqueSpec

POLL_SECONDS = 0.3

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One technique with one seed, in a folder of its own under the recipe's output.

    Attributes:
        spec: the technique.
        recipe: of this run alone.
    """

    spec: TechniqueSpec
    recipe: Recipe

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        spec: TechniqueSpec,
        seed: int,
        *,
        folder: str | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Run:
        """The run of a recipe's technique with one of its seeds.

        Args:
            recipe: of all runs.
            spec: the technique.
            seed: of this run.
            folder: where its results go, in the recipe's output; None: those of the recipe as it is have their own.
            changes: fields of the recipe that this run has otherwise.
        """
        changed = recipe.model_copy(update={"score_test": True, **(changes or {})})
        place = Path(recipe.output) / (folder or f"runs/{spec.slug}-s{seed}")
        defaults = {
            name: Recipe.model_fields[name].get_default(call_default_factory=True)
            for name in NOT_IN_RESULT - {"output", "compare", "seeds"}
        }
        own = {
            "technique": spec,
            "training": changed.training.model_copy(update={"seed": seed}),
            "output": str(place),
            "compare": (spec,),
            "seeds": (seed,),
        }
        return cls(spec, changed.model_copy(update={**defaults, **own}))

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return Path(self.recipe.output)

    def metrics(self, data: str) -> Metrics | None:
        """What it measured, if it ran to its end with this recipe on the rows of this fingerprint."""
        with contextlib.suppress(UserError):
            metrics: Metrics = files.read_json(self.folder / "metrics.json")
            known = self.recipe.fingerprint(), data, self.recipe.text_hash()
            if (metrics["recipe"], metrics["data"], metrics.get("text")) == known:
                return metrics
        return None

    def progress(self) -> dict[str, Any]:
        """The last line that it logged."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            line: dict[str, Any] = json.loads((self.folder / "log.jsonl").read_text("utf-8").splitlines()[-1])
            return line
        return {}


def validation_score(metrics: Metrics) -> float:
    """The validation score of the epoch that a run kept."""
    return float(metrics["curve"][metrics["best_epoch"] - 1]["validation_score"])


def check_begins_anew(recipe: Recipe) -> None:
    """Raise a UserError if a recipe's runs would go on from an adapter, where each is to begin anew."""
    if recipe.start is not None:
        raise UserError(
            f"start={recipe.start!r} is where `smidgen train` goes on from; here every run begins anew. Leave it out."
        )


def check_can_begin(recipe: Recipe) -> None:
    """Raise a UserError if a recipe's runs cannot begin, each anew, or a package that they need is missing."""
    check_tracker(recipe.training)
    check_begins_anew(recipe)


def check_nothing_is_lost(missing: Sequence[Run]) -> None:
    """Raise a UserError if a run that is to be trained has a folder with a finished run, which is then another's."""
    if kept := [run.folder for run in missing if (run.folder / "metrics.json").is_file()]:
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        raise UserError(
            f"{kept[0]}{more}: finished runs of another recipe or of other rows, which would be lost. Remove them, or "
            "give another output."
        )


def execute(
    runs: Sequence[Run],
    *,
    at_once: int = 1,
    ended: Callable[[Run, str | None], None],
    watch: Callable[[list[Run]], None],
    skip_after_failure: bool = False,
) -> list[Run]:
    """Train each run; one with a checkpoint goes on from it.

    Args:
        runs: in the order in which they start.
        at_once: how many processes; each gets its share of the cores, unless OMP_NUM_THREADS says how many.
        ended: called with a run that ended, and with what went wrong or None.
        watch: called with those that run now, a few times a second.
        skip_after_failure: whether runs of a technique that has failed are left out, if they have not started.

    Returns:
        The runs that a signal stopped, or kept from starting.
    """
    waiting, running = list(runs), list[_Process]()
    with stoppable() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and len(running) < at_once and not signals:
                    running.append(_Process(waiting.pop(0), at_once))
                if signals:
                    for process in running:
                        process.stop()
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    error = process.error()
                    if signals and error is not None:
                        waiting.append(process.run)
                        continue
                    ended(process.run, error)
                    if error is not None and skip_after_failure:
                        waiting = [run for run in waiting if run.spec != process.run.spec]
                watch([process.run for process in running])
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:
                process.stop()
    return waiting


class _Process:
    """A run that was started."""

    def __init__(self, run: Run, at_once: int) -> None:
        self.run = run
        self._told = False
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / "recipe.yaml"
        run.recipe.save(path)
        arguments = [sys.executable, "-m", "smidgen", "train", str(path), "--quiet"]
        if (run.folder / "checkpoint").is_dir():
            arguments.append("--resume")
        share = share_of_cores(at_once)
        self._output = run.folder / "output.txt"
        with self._output.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                arguments, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=share | os.environ
            )

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to save a checkpoint and end; Ctrl-C reaches it from the terminal, a SIGTERM of ours does not."""
        if not self._told:
            self._told = True
            self._process.terminate()  # nothing happens to one that has ended

    def error(self) -> str | None:
        """What went wrong with a run that has ended, or None."""
        if self._process.returncode == 0:
            return None
        return what_went_wrong(self._process.returncode, self._output.read_text("utf-8", errors="replace").strip())


def share_of_cores(at_once: int) -> dict[str, str]:
    """The environment of a process that shares the machine with so many less one."""
    if at_once == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // at_once))}


def budget(training: TrainingConfig, rows: int, *, steps: int) -> TrainingConfig:
    """The same training with so many steps.

    Args:
        training: with its own budget.
        rows: to train on.
        steps: of the optimizer.
    """
    epochs = math.ceil(steps / math.ceil(rows / training.batch_size))
    return training.model_copy(update={"epochs": epochs, "max_steps": steps})


def steps_of(training: TrainingConfig, rows: int) -> int:
    """How many steps a training has."""
    steps = math.ceil(rows / training.batch_size) * training.epochs
    return min(steps, training.max_steps or steps)


def what_went_wrong(status: int, said: str) -> str:
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
