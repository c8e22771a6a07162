"""What a run would train and what it would cost, before it runs: parameter identification and subset selection.

Counts and the size on disk are exact. Memory and time are estimates from three steps that are really made and undone:
the weights and the random state are as they were afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import targets
from smidgen.process.batches import order, pieces
from smidgen.process.compiling import compiled_blocks
from smidgen.process.encoding import Encoded
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.memory import peak_memory, used_memory
from smidgen.process.models import gradient_checkpointing
from smidgen.process.parallel import this_process
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.shelf import Shelf
from smidgen.process.train import backward
from smidgen.stepping import unwatched

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
    model: PreTrainedModel, adapter: Adapter, rows: Sequence[Encoded], training: TrainingConfig, pad_id: int
) -> Plan:
    """Look at an attached adapter and try three of its steps.

    Args:
        model: the model, on the device that it would train on.
        adapter: what would be trained.
        rows: the training rows.
        training: the budget.
        pad_id: fills short rows.
    """
    lengths = [len(row.input_ids) for row in rows]
    batches = order(lengths, training.batch_size, seed=training.seed, epoch=0)
    steps = len(batches) * training.epochs
    steps_made = min(steps, training.max_steps or steps)
    at_once = [piece for batch in batches for piece in _at_once(batch, lengths, training)]
    trial = try_steps(model, adapter, rows, at_once, training, pad_id, keep=steps_made > len(batches))
    padded = sum(_padded(lengths, piece, adapter.virtual_tokens) for piece in at_once)
    whole = trial.seconds_per_token * padded * training.epochs
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


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the tried steps showed; states are kept once for each of the rows' own tokens."""

    seconds_per_token: float
    keeping_seconds_per_token: float
    frozen_blocks: int
    noisy_blocks: int
    optimizer_bytes: int
    activation_bytes: int
    memory_bytes: int


def try_steps(
    model: PreTrainedModel,
    adapter: Adapter,
    rows: Sequence[Encoded],
    at_once: Sequence[Sequence[int]],
    training: TrainingConfig,
    pad_id: int,
    *,
    keep: bool,
) -> Trial:
    """Make a step on the largest batch, counting what it keeps for backward, then two on a typical one, timed.

    With `keep`, the steps start from kept states where a run's would.
    """
    lengths = [len(row.input_ids) for row in rows]
    by_size = sorted(at_once, key=lambda piece: _padded(lengths, piece, 0))
    largest, typical = by_size[-1], by_size[len(by_size) // 2]
    with (
        _undone(model, adapter),
        unwatched(adapter),
        gradient_checkpointing(model, training.gradient_checkpointing),
        compiled_blocks(model, training.compile),
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(FrozenStates(model, adapter, training, pad_id, Shelf(Path(folder)))) as frozen,
    ):
        keeping = 0.0
        for piece in (largest, typical) if keep else ():
            started = time.perf_counter()
            frozen.keep([rows[row] for row in piece])
            keeping = time.perf_counter() - started
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.0)
        before = used_memory(model.device)
        with counted() as saved:
            _step(model, optimizer, [rows[row] for row in largest], training, pad_id, frozen)
        state = 3 * sum(p.numel() * p.element_size() for p in adapter.parameters())  # gradient and AdamW's two moments
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            _step(model, optimizer, [rows[row] for row in typical], training, pad_id, frozen)
            seconds.append(time.perf_counter() - started)
        moments = sum(
            tensor.numel() * tensor.element_size()
            for state_of in optimizer.state.values()
            for tensor in state_of.values()
            if tensor.dim()
        )
        peak = max(peak_memory(model.device), before + state + saved.total())
    per_token = min(seconds) / _padded(lengths, typical, adapter.virtual_tokens)
    kept_per_token = keeping / sum(lengths[row] for row in typical)
    return Trial(
        seconds_per_token=per_token,
        keeping_seconds_per_token=kept_per_token,
        frozen_blocks=frozen.depth,
        noisy_blocks=frozen.noisy_depth if keep else 0,
        optimizer_bytes=moments,
        activation_bytes=saved.total(),
        memory_bytes=int(peak),
    )


def _at_once(batch: Sequence[int], lengths: Sequence[int], training: TrainingConfig) -> list[list[int]]:
    """The rows that all processes together pass through the model at once."""
    processes = this_process().num_processes
    most = training.micro_batch_tokens
    rows = sorted(batch, key=lambda row: -lengths[row]) if most else batch
    size = (training.micro_batch_size or training.batch_size) * processes
    return pieces(rows, [lengths[row] for row in rows], size, most and most * processes)


def _padded(lengths: Sequence[int], batch: Sequence[int], more: int) -> int:
    return len(batch) * (max(lengths[row] for row in batch) + more)


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Encoded],
    training: TrainingConfig,
    pad_id: int,
    frozen: FrozenStates,
) -> None:
    backward(model, batch, training, pad_id, frozen)
    optimizer.step()
    optimizer.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@contextlib.contextmanager
def _undone(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """Whatever is done inside leaves the weights, the mode, the gradients and the random state as they were."""
    state, mode = adapter.state(), model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            adapter.load_state(state)
            model.zero_grad(set_to_none=True)
            model.train(mode)


@contextlib.contextmanager
def counted() -> Iterator[Counter[int]]:
    """Count the bytes that autograd keeps, each storage once; weights, which are there anyway, are left out."""
    storages: Counter[int] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def _own_kinds(adapter: Adapter) -> list[str]:
    """The model's own trained parameters, those of one kind in one line: "LayerNorm.weight in 12 places"."""
    names = [name for name, _ in adapter.named_parameters() if name in adapter.own_names]
    if len(names) > 40:
        return [f"{len(names)} of the model's own parameters"]
    kinds = Counter(".".join(part for part in name.split(".") if not part.isdigit()) for name in names)
    return [f"{kind} in {count} places" if count > 1 else kind for kind, count in kinds.items()]
