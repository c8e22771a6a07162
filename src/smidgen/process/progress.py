"""Where a training is, what it has gathered, and which of its epochs is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from smidgen.process.probe import Probe
from smidgen.process.scores import Scores
from smidgen.report.numbers import metric_named


@dataclasses.dataclass
class Progress:
    """Where a run is, and what it has gathered; it is saved with a checkpoint.

    Attributes:
        epoch: the current epoch, or part of one, from 0; so are the other epochs here.
        position: batches of it that are done.
        step: optimizer steps that are done.
        seconds: time spent in training steps.
        tokens: real tokens trained on.
        epoch_loss: the sum of the losses of the current epoch's steps.
        best_score: the best validation score so far; higher is better.
        best_loss: the validation loss then, which decides between equal scores.
        best_epoch: the epoch that is kept: of those with this score, the one with the lowest loss. Epochs before a
            technique's schedule has come to its end are no candidates.
        score_epoch: when the score was first reached, from which patience counts.
        probe_loss: the loss of the probe before the first step; None: there is no probe.
        is_forgotten: whether it has risen by more than it may.
        curve: one point an epoch: its number, losses and scores.
        log_bytes: the log's length.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    epoch_loss: float = 0.0
    best_score: float | None = None
    best_loss: float | None = None
    best_epoch: int = 0
    score_epoch: int = 0
    probe_loss: float | None = None
    is_forgotten: bool = False
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    log_bytes: int = 0

    def judge(
        self, scores: Scores, metric: str, *, parts: int, probe: Probe | None = None, is_settled: bool = True
    ) -> bool:
        """Note the scores of the current epoch; whether it is the best so far, and to be kept.

        Args:
            scores: on the validation rows.
            metric: the one that decides; between equal ones the lower loss does.
            parts: into which an epoch is divided.
            probe: what should not be forgotten; an epoch in which it is is none to keep.
            is_settled: whether the technique's schedule has come to its end; an epoch before is none to keep.
        """
        point = self._point(scores, metric, parts)
        self.curve.append(point)
        if probe is not None and self.probe_loss is not None:
            point["probe_loss"] = probe.loss()
            self.is_forgotten = probe.is_forgotten(self.probe_loss, point["probe_loss"])
        loss = float(scores["loss"])
        score = metric_named(metric).good(float(scores[metric]))
        if self.best_score is None or score > self.best_score:
            self.score_epoch = self.epoch
        if self.is_forgotten or not is_settled or not self._is_better(score, loss):
            return False
        self.best_score, self.best_loss, self.best_epoch = score, loss, self.epoch
        return True

    def _is_better(self, score: float, loss: float) -> bool:
        if self.best_score is None or self.best_loss is None:
            return True
        return (score, -loss) > (self.best_score, -self.best_loss)

    def _point(self, scores: Scores, metric: str, parts: int) -> dict[str, Any]:
        whole, rest = divmod(self.epoch + 1, parts)
        return {
            "epoch": whole + rest / parts if rest else whole,
            "step": self.step,
            "seconds": self.seconds,
            "train_loss": self.epoch_loss / max(1, self.position),
            "validation_loss": scores["loss"],
            "validation_score": scores[metric],
        }

    def is_over(self, patience: int | None, parts: int) -> bool:
        """Whether there is no epoch to come: too much is forgotten, or the score has not risen for `patience` epochs.

        Args:
            patience: epochs; None: without end.
            parts: into which an epoch is divided.
        """
        is_patient = patience is None or self.epoch - self.score_epoch <= patience * parts
        return self.is_forgotten or not is_patient

    def next_epoch(self) -> None:
        """Begin another one."""
        self.epoch, self.position, self.epoch_loss = self.epoch + 1, 0, 0.0
