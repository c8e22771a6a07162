"""Fine-tuning: one loop, in one process or several, that can be stopped at any step and goes on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smidgen.errors import Interrupted, UserError
from smidgen.process import checkpoint, parallel
from smidgen.process.batches import TrainingRows, collate, idle, micro_batches
from smidgen.process.checkpoint import Checkpoint
from smidgen.process.compiling import compiled_blocks
from smidgen.process.encoding import Encoded
from smidgen.process.evaluate import count_labels, row_losses
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.log import Log
from smidgen.process.models import gradient_checkpointing
from smidgen.process.onednn import exact_onednn
from smidgen.process.optimizer import Rates, make_optimizer, set_rates
from smidgen.process.probe import Probe
from smidgen.process.progress import Progress
from smidgen.process.run_recipe import RunRecipe, TrainingConfig
from smidgen.process.scores import Scores
from smidgen.process.signals import stoppable
from smidgen.report.numbers import metric_named
from smidgen.stepping import Clock, is_settled, schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter


def train(
    model: PreTrainedModel,
    adapter: Adapter,
    data: TrainingRows,
    evaluate: Callable[[], Scores],
    *,
    recipe: RunRecipe,
    rates: Rates,
    pad_id: int,
    fingerprint: str,
    frozen: FrozenStates | None = None,
    probe: Probe | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Progress:
    """Train an attached adapter and leave its best epoch in it.

    A step's loss and gradient are those of its whole batch, however many processes and micro-batches share it. Nothing
    of a step is left to chance: its rows are a function of seed and epoch, its dropout of seed, step and process.

    Args:
        model: the model that the adapter is on.
        adapter: what is trained.
        data: the training rows.
        evaluate: scores the model on the validation rows: `loss`, and what the task is judged by.
        recipe: its `training` is the budget, its `output` the folder for the log and the checkpoint.
        rates: the learning rates of its techniques and of the task's head.
        pad_id: fills short rows.
        fingerprint: of the rows.
        frozen: the states of rows that are the same in every epoch; None: no rows are.
        probe: what should not be forgotten; an epoch in which it is ends the training, and is not kept.
        resume: whether to go on from the checkpoint in the output folder.
        quiet: whether to show no progress.

    Returns:
        What the run gathered.

    Raises:
        UserError: the checkpoint does not fit, the disk is full, the loss is not finite, or the first epoch forgets too
            much of the probe.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    config, folder = recipe.training, Path(recipe.output)
    parallel.place(model, adapter)
    optimizer = make_optimizer(adapter, config, rates)
    epoch_steps = sum(len(data.batches(part)) for part in range(data.parts))
    steps = min(epoch_steps * config.epochs, config.max_steps or epoch_steps * config.epochs)
    progress, best = Progress(), dict[str, Tensor]()
    if resume:
        progress, best = _restore(checkpoint.load(folder / "checkpoint", recipe, fingerprint), adapter, optimizer)
    elif probe is not None:
        progress.probe_loss = probe.loss()
    adapter.clock = Clock(progress.step, steps)
    schedule(adapter)
    saver = _Saver(recipe, fingerprint, adapter, optimizer)

    recomputing = gradient_checkpointing(model, config.gradient_checkpointing)
    compiled = compiled_blocks(model, config.compile)
    log = Log(folder, config, metric_named(recipe.metric), progress, parts=data.parts, steps=steps, quiet=quiet)
    with log, stoppable() as stop, recomputing, compiled:
        if frozen is not None:
            frozen.stopped = lambda: stop
        while (progress.step < steps or progress.position) and not progress.is_over(config.patience, data.parts):
            rows, batches = data.rows(progress.epoch), data.batches(progress.epoch)
            model.train()
            if frozen is not None and steps > epoch_steps:
                started = time.perf_counter()
                frozen.keep([rows[number] for number in range(len(rows))])
                progress.seconds += time.perf_counter() - started
                if stop:  # in the middle of it; the process is alone, since others keep no states
                    saver.save(progress, best, log)
                    raise _interrupted(progress, steps, recipe)
            for place in range(progress.position, min(len(batches), progress.position + steps - progress.step)):
                batch = [rows[row] for row in batches[place]]
                started = time.perf_counter()
                _seed(config.seed, progress.step)
                rate = set_rates(optimizer, progress.step, steps, config)
                own_loss = backward(model, batch, config, pad_id, frozen)
                if progress.step == 0:
                    _check_gradients(adapter)
                parallel.sum_gradients(adapter)
                norm = parallel.whole(torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), config.clip))
                loss, stops, due = parallel.summed(own_loss, bool(stop), saver.is_due(progress.step + 1))
                _check_finite(loss, float(norm), progress.step, rate)
                optimizer.step()
                optimizer.zero_grad()
                progress.seconds += time.perf_counter() - started
                progress.step += 1
                progress.position += 1
                progress.epoch_loss += loss
                progress.tokens += sum(len(row.input_ids) for row in batch)
                log.step(progress, loss, rate)
                if stops or due or progress.step == steps:  # after the last, scores are still to come
                    saver.save(progress, best, log)
                if stops:
                    raise _interrupted(progress, steps, recipe)
            if progress.judge(evaluate(), recipe.metric, parts=data.parts, probe=probe, is_settled=is_settled(adapter)):
                best = parallel.get_weights(adapter)
            log.epoch(progress)
            progress.next_epoch()
        if progress.step < steps:  # it is over before
            saver.save(progress, best, log)
        if parallel.summed(bool(stop))[0]:
            raise _interrupted(progress, steps, recipe)
    if not best and not progress.is_forgotten:
        raise UserError(f"No epoch came to what the schedule of {adapter!r} ends at, so that none could be kept.")
    if not best:
        last = progress.curve[-1]
        raise UserError(
            f"After epoch {last['epoch']:g}, before any that could be kept, the loss of probe.text was "
            f"{last['probe_loss']:.3f}, and at the start {progress.probe_loss:.3f}: more than probe.rise lets it rise. "
            "Lower training.learning_rate, or raise it."
        )
    parallel.set_weights(adapter, best)
    return progress


def _interrupted(progress: Progress, steps: int, recipe: RunRecipe) -> Interrupted:
    folder = Path(recipe.output)
    return Interrupted(
        f"Stopped after step {progress.step} of {steps}; a checkpoint is in {folder / 'checkpoint'}. "
        f"Go on with: smidgen {recipe.command} {folder / 'recipe.yaml'} --resume"
    )


def _seed(seed: int, step: int) -> None:
    """Make dropout a function of seed, step and process, so that a run that resumes needs no random state."""
    entropy = np.random.SeedSequence([seed, step, parallel.this_process().process_index])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def backward(
    model: PreTrainedModel,
    batch: Sequence[Encoded],
    config: TrainingConfig,
    pad_id: int,
    frozen: FrozenStates | None = None,
) -> float:
    """Add up the gradients of this process's part of a batch, in pieces; returns its part of the batch's mean loss."""
    process = parallel.this_process()
    pieces = micro_batches(
        range(len(batch)),
        [len(row.input_ids) for row in batch],
        process=process.process_index,
        processes=process.num_processes,
        most_rows=config.micro_batch_size,
        most_tokens=config.micro_batch_tokens,
    )
    labels = max(1, sum(map(count_labels, batch)))  # of all processes; none where nothing could be hidden
    total = torch.zeros((), device=process.device)
    with exact_onednn(model.device):
        for piece in pieces:
            rows = [batch[row] for row in piece] or [idle(batch[-1])]
            inputs = collate(rows, pad_id)
            with contextlib.nullcontext() if frozen is None else frozen.given(rows):
                loss = row_losses(model, inputs, config.precision).sum() / labels
                loss.backward()  # inside, since it may compute blocks again
            total += loss.detach()
    return float(total)


def _check_gradients(adapter: Adapter) -> None:
    try:
        adapter.check_gradients()
    except RuntimeError as error:  # of the targets that the recipe names
        raise UserError(str(error)) from error


def _check_finite(loss: float, norm: float, step: int, rate: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss was {loss}" if not math.isfinite(loss) else f"gradient's norm was {norm}"
    raise UserError(
        f"The {what} at step {step + 1}, with learning rate {rate:.2g}. Lower training.learning_rate, lengthen "
        "training.warmup, or use training.precision=fp32 if it is bf16."
    )


class _Saver:
    """Writes the run's checkpoints, when they are due."""

    def __init__(self, recipe: RunRecipe, fingerprint: str, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
        self.recipe, self.fingerprint, self.adapter, self.optimizer = recipe, fingerprint, adapter, optimizer
        self.folder = Path(recipe.output) / "checkpoint"
        self.last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, counted from 1, by steps or by minutes."""
        config = self.recipe.training
        by_steps = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
        minutes = (time.monotonic() - self.last) / 60
        return by_steps or (config.checkpoint_minutes or math.inf) <= minutes

    def save(self, progress: Progress, best: dict[str, Tensor], log: Log) -> None:
        """Write one now."""
        progress.log_bytes = log.bytes()
        weights, moments = parallel.get_weights(self.adapter), parallel.get_moments(self.adapter, self.optimizer)
        if parallel.this_process().is_main_process:
            written = Checkpoint(dataclasses.asdict(progress), weights, best, moments)
            checkpoint.save(self.folder, written, self.recipe, self.fingerprint)
        parallel.this_process().wait_for_everyone()
        self.last = time.monotonic()


def _restore(
    saved: Checkpoint, adapter: Adapter, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a checkpoint's weights and moments in place."""
    try:
        parallel.set_weights(adapter, saved.weights)
        parallel.set_moments(adapter, optimizer, saved.moments)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The checkpoint does not fit what this recipe trains: {error}. Train without --resume."
        ) from error
    return Progress(**saved.progress), dict(saved.best)
