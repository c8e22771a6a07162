"""What a run says while it trains: lines in log.jsonl, progress on a terminal, and a tracker if the recipe has one."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from smidgen.errors import UserError
from smidgen.process.parallel import this_process
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.scores import perplexity
from smidgen.report.numbers import Metric, short

if TYPE_CHECKING:
    from smidgen.process.progress import Progress

LINES = 200
"""About how many steps of a run are logged."""

PATIENCE = 20.0
"""Seconds between lines where there is no terminal to draw a bar on."""


class Log:
    """The log of one run; the main process writes it.

    Args:
        folder: where log.jsonl goes.
        config: names the tracker.
        metric: what a validation score is.
        progress: where the run starts; what was logged after its checkpoint is logged again.
        parts: of an epoch, after each of which the model is scored.
        steps: of the whole run.
        quiet: whether nothing is shown.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig,
        metric: Metric,
        progress: Progress,
        *,
        parts: int,
        steps: int,
        quiet: bool,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metric, self.parts = metric, parts
        self.steps, self.every = steps, max(1, steps // LINES)
        is_main = this_process().is_main_process
        self.tracker = _tracker(folder, config) if config.tracker is not None else None
        self.file = _open(folder / "log.jsonl", progress.log_bytes) if is_main else None
        console = Console(stderr=True)
        self.console = console if is_main and not quiet else None
        self.shown = time.monotonic()
        self.bar: Bar | None = None
        if self.console is not None and console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.completed}/{task.total}  {task.description}"))
            self.bar = Bar(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=steps, completed=progress.step)

    def __enter__(self) -> Log:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            for started in self.tracker.trackers:
                started.finish()

    def bytes(self) -> int:
        """The log's length, once what was logged is in the file for good."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def step(self, progress: Progress, loss: float, rate: float) -> None:
        """Tell of a step that is done."""
        if self.console is not None:
            words = self._words(progress, loss, rate)
            if self.bar is not None:
                self.bar.update(self.task, completed=progress.step, description=words)
            elif time.monotonic() - self.shown > PATIENCE:
                self.console.print(f"step {progress.step} of {self.steps}  {words}", highlight=False, soft_wrap=True)
                self.shown = time.monotonic()
        if progress.step % self.every == 0 or progress.step == self.steps:
            self._write({"epoch": progress.epoch // self.parts + 1, "step": progress.step, "loss": loss, "rate": rate})

    def epoch(self, progress: Progress) -> None:
        """Tell of an epoch that is done and judged."""
        point = progress.curve[-1]
        self._write({key: value for key, value in point.items() if key != "seconds"})
        if self.console is not None:
            words = f"epoch {point['epoch']:g}: training loss {point['train_loss']:.4f}, validation loss "
            words += f"{point['validation_loss']:.4f}"
            if self.metric.percent:
                words += f", {self.metric.word} {100 * point['validation_score']:.2f} %"
            else:
                words += f", perplexity {short(perplexity(point['validation_loss']))}"
            if "probe_loss" in point:
                words += f", probe {point['probe_loss']:.4f}"
            self.console.print(words, highlight=False, soft_wrap=True)

    def _words(self, progress: Progress, loss: float, rate: float) -> str:
        speed = progress.tokens / max(progress.seconds, 1e-9)
        left = round(progress.seconds / progress.step * (self.steps - progress.step))
        minutes, seconds = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"epoch {progress.epoch // self.parts + 1}  loss {loss:.3f}  rate {rate:.1e}  {speed:,.0f} tokens/s  "
            f"{hours}:{minutes:02}:{seconds:02} left"
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()
        if self.tracker is not None:
            self.tracker.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])


def check_tracker(config: TrainingConfig) -> None:
    """Raise a UserError if the tracker's package is not installed."""
    if config.tracker is not None and importlib.util.find_spec(config.tracker) is None:
        raise UserError(f"training.tracker={config.tracker} needs its package: pip install {config.tracker}")


def _open(path: Path, kept: int) -> BufferedWriter:
    """The log, to append to after the bytes that are kept."""
    file = path.open("ab")
    file.truncate(min(kept, file.tell()))
    file.seek(0, os.SEEK_END)
    return file


def _tracker(folder: Path, config: TrainingConfig) -> Accelerator:
    """Accelerate's tracker of this name, which keeps what it keeps in files in `folder`."""
    assert config.tracker is not None
    accelerator = Accelerator(
        cpu=this_process().device.type == "cpu", mixed_precision="no", log_with=config.tracker, project_dir=folder
    )
    accelerator.init_trackers("smidgen", config=config.model_dump(exclude_none=True))
    return accelerator
