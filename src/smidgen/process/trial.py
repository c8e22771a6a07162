"""Steps of a run that are really made, and undone: what they keep and take, for the estimates of a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smidgen.modes import chance_kept, modes_kept
from smidgen.process.compiling import compiled_blocks
from smidgen.process.encoding import Encoded
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.memory import peak_memory
from smidgen.process.models import gradient_checkpointing
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.shelf import Shelf
from smidgen.process.train import backward
from smidgen.stepping import unwatched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter

TYPICAL, LARGE = 18, 6
"""Steps that are tried: from the smallest to the largest alike, and the largest. A run's peak is that of many sizes one
after the other, since what one has freed is not all used again by the next."""

SECONDS = 20.0
"""After these no more steps are begun."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the tried steps showed.

    Attributes:
        seconds_per_token: of a step, padding and virtual tokens included.
        keeping_seconds_per_token: of states that are kept, once for each of the rows' own tokens.
        frozen_blocks: see `Plan`.
        noisy_blocks: see `Plan`.
        optimizer_bytes: see `Plan`.
        activation_bytes: see `Plan`.
        memory_bytes: see `Plan`.
    """

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
    evaluate: Callable[[Sequence[Encoded]], object],
) -> Trial:
    """Make steps of many sizes, as a run comes to them, and score the longest rows, as it does at the end of an epoch.

    Args:
        model: the model that the adapter is on; it is left as it was.
        adapter: what would be trained.
        rows: the training rows.
        at_once: the numbers of the rows that pass through the model at once, of an epoch.
        training: the budget.
        pad_id: fills short rows.
        keep: whether steps start from kept states where a run's would.
        evaluate: scores rows.
    """
    lengths = [len(row.input_ids) for row in rows]
    by_size = sorted(at_once, key=lambda piece: padded(lengths, piece, 0))
    places = np.linspace(0, len(by_size) - 1, min(TYPICAL, len(by_size))).round().astype(int).tolist()
    large = range(max(0, len(by_size) - LARGE), len(by_size))
    tried = np.random.default_rng(0).permutation([*places, *large]).tolist()
    with (
        _undone(model, adapter),
        unwatched(adapter),
        gradient_checkpointing(model, training.gradient_checkpointing),
        compiled_blocks(model, training.compile),
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(FrozenStates(model, adapter, training, pad_id, Shelf(Path(folder)))) as frozen,
    ):
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.0)

        def step(place: int) -> float:
            """The seconds of a step."""
            batch = [rows[row] for row in by_size[place]]
            began = time.perf_counter()
            backward(model, batch, training, pad_id, frozen)
            torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), training.clip)
            optimizer.step()
            optimizer.zero_grad()
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return time.perf_counter() - began

        used = sorted({row for place in [len(by_size) // 2, *tried] for row in by_size[place]})
        began = time.perf_counter()
        if keep:
            frozen.keep([rows[row] for row in used])
        keeping = time.perf_counter() - began
        step(len(by_size) // 2)  # the first one takes longer
        with counted(model) as saved:
            step(len(by_size) - 1)
        seconds, tokens = 0.0, 0
        began = time.perf_counter()
        for place in tried:
            taken = step(place)
            if place in places:
                seconds += taken
                tokens += padded(lengths, by_size[place], adapter.virtual_tokens)
            if tokens and time.perf_counter() - began > SECONDS:
                break
        model.eval()
        evaluate(sorted(rows, key=lambda row: -len(row.input_ids))[: training.rows_at_once])
        moments = sum(
            tensor.numel() * tensor.element_size()
            for state in optimizer.state.values()
            for tensor in state.values()
            if tensor.dim()
        )
        return Trial(
            seconds_per_token=seconds / tokens,
            keeping_seconds_per_token=keeping / sum(lengths[row] for row in used),
            frozen_blocks=frozen.depth,
            noisy_blocks=frozen.noisy_depth if keep else 0,
            optimizer_bytes=moments,
            activation_bytes=saved.total(),
            memory_bytes=peak_memory(model.device),
        )


def padded(lengths: Sequence[int], batch: Sequence[int], more: int) -> int:
    """Tokens of a batch whose rows are padded to its longest, each with so many virtual ones."""
    return len(batch) * (max(lengths[row] for row in batch) + more)


@contextlib.contextmanager
def _undone(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """Whatever is done inside leaves the weights, the mode, the gradients and the random state as they were."""
    state = adapter.state()
    with chance_kept(model), modes_kept(model):
        model.train()
        try:
            yield
        finally:
            adapter.load_state(state)
            model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def counted(model: torch.nn.Module) -> Iterator[Counter[int]]:
    """Count the bytes that autograd keeps, each storage once; the model's own, which are there anyway, are left out."""
    storages: Counter[int] = Counter()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
