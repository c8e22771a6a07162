"""What a run would train and what it would cost, before it runs: parameter identification and subset selection.

Counts and the size on disk are exact. Memory and time are estimates from some two dozen steps that are really made and
undone: the weights and the random state are as they were afterwards.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smidgen import targets
from smidgen.process.batches import order, pieces
from smidgen.process.encoding import Encoded
from smidgen.process.parallel import this_process
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.trial import padded, try_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be trained and what it would cost.

    Attributes:
        technique: its title, several joined by +.
        options: the hyperparameters, a line a technique.
        matched: which kinds of layers get deltas, in how many blocks, a line a kind.
        own: which of the model's own parameters are trained, a line a kind.
        trainable: how many numbers are trained.
        frozen: how many are not.
        disk_bytes: what the saved adapter takes.
        virtual_tokens: positions that prompts and prefixes take from the text.
        rows: training rows.
        tokens: real tokens of an epoch.
        steps: optimizer steps of the whole run.
        optimizer_bytes: of AdamW's moments.
        activation_bytes: what a step on the longest batch keeps for its backward pass, beside the weights.
        memory_bytes: estimated peak memory of the process, or of the accelerator.
        frozen_blocks: how many blocks are computed once, their states kept.
        noisy_blocks: how many are not, only because they drop out.
        seconds: estimated time of all steps and of what is kept, without evaluation.
    """

    technique: str
    options: list[str]
    matched: list[str]
    own: list[str]
    trainable: int
    frozen: int
    disk_bytes: int
    virtual_tokens: int
    rows: int
    tokens: int
    steps: int
    optimizer_bytes: int
    activation_bytes: int
    memory_bytes: int
    frozen_blocks: int
    noisy_blocks: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The fields, for --json."""
        return dataclasses.asdict(self)


def make_plan(
    model: PreTrainedModel,
    adapter: Adapter,
    rows: Sequence[Encoded],
    training: TrainingConfig,
    pad_id: int,
    evaluate: Callable[[Sequence[Encoded]], object],
) -> Plan:
    """Look at an attached adapter and try some of its steps.

    Args:
        model: the model, on the device that it would train on.
        adapter: what would be trained.
        rows: the training rows.
        training: the budget.
        pad_id: fills short rows.
        evaluate: scores rows, as is done after each epoch.
    """
    lengths = [len(row.input_ids) for row in rows]
    batches = order(lengths, training.batch_size, seed=training.seed, epoch=0)
    steps = len(batches) * training.epochs
    steps_made = min(steps, training.max_steps or steps)
    at_once = [piece for batch in batches for piece in _at_once(batch, lengths, training)]
    keep = steps_made > len(batches)
    trial = try_steps(model, adapter, rows, at_once, training, pad_id, keep=keep, evaluate=evaluate)
    tokens = sum(padded(lengths, piece, adapter.virtual_tokens) for piece in at_once)
    whole = trial.seconds_per_token * tokens * training.epochs
    return Plan(
        technique=" + ".join(method.title for method in adapter.methods),
        options=[f"{method.title}: {method.summary() or 'no options'}" for method in adapter.methods],
        matched=[line for found in adapter.places for line in targets.report(model, found)],
        own=_own_kinds(adapter),
        trainable=adapter.trainable,
        frozen=adapter.total - adapter.trainable,
        disk_bytes=adapter.disk_bytes,
        virtual_tokens=adapter.virtual_tokens,
        rows=len(rows),
        tokens=sum(lengths),
        steps=steps_made,
        optimizer_bytes=trial.optimizer_bytes,
        activation_bytes=trial.activation_bytes,
        memory_bytes=trial.memory_bytes,
        frozen_blocks=trial.frozen_blocks,
        noisy_blocks=trial.noisy_blocks,
        seconds=whole * steps_made / steps + trial.keeping_seconds_per_token * sum(lengths),
    )


def _at_once(batch: Sequence[int], lengths: Sequence[int], training: TrainingConfig) -> list[list[int]]:
    """The rows that all processes together pass through the model at once."""
    processes = this_process().num_processes
    most = training.micro_batch_tokens
    rows = sorted(batch, key=lambda row: -lengths[row]) if most else batch
    size = (training.micro_batch_size or training.batch_size) * processes
    return pieces(rows, [lengths[row] for row in rows], size, most and most * processes)


def _own_kinds(adapter: Adapter) -> list[str]:
    """The model's own trained parameters, those of one kind in one line: "LayerNorm.weight in 12 places"."""
    names = [name for name, _ in adapter.named_parameters() if name in adapter.own_names]
    if len(names) > 40:
        return [f"{len(names)} of the model's own parameters"]
    kinds = Counter(".".join(part for part in name.split(".") if not part.isdigit()) for name in names)
    return [f"{kind} in {count} places" if count > 1 else kind for kind, count in kinds.items()]
