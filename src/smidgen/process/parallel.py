"""Several processes that train one adapter together: sums over all of them, and a model too large for one device.

`accelerate launch` starts them. Each has the whole adapter and takes a part of every batch; their gradients are
summed, so that a run has the losses of one process, up to the order of float sums.

With `--use_fsdp --fsdp_version 2`, FSDP2 shards the model: a process holds a part of each block and gathers the rest
when the block's turn comes. We call torch's `fully_shard` ourselves, because accelerate's `prepare` does so on GPUs
only, and would shard the adapter too. The adapter stays whole in every process: it is small, and what the layers of a
reparameterization share would be in several groups, which FSDP2 refuses. Full fine-tuning, which trains everything,
is sharded like any model.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smidgen.errors import UserError
from smidgen.layers import is_sharded
from smidgen.targets import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""How long a process waits for another, which may be reading a large corpus."""


@functools.cache
def this_process() -> PartialState:
    """Which process this is, of how many, and on which device."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)  # unasked, it looks for GPUs only
    if state.num_processes > 1:
        atexit.register(_leave)
    return state


def _leave() -> None:
    """Take leave of the others before the interpreter ends.

    Gloo's threads let go of their last tensors a moment after the collective that used them. They need the interpreter
    for it, and abort the process if it has gone.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.1)


def in_main(work: Callable[[], None]) -> None:
    """Do something in the main process while the others wait.

    Raises:
        UserError: it did, in all of them.
    """
    said: list[str | None] = [None]
    if this_process().is_main_process:
        try:
            work()
        except UserError as error:
            said = [str(error)]
    (problem,) = broadcast_object_list(said)
    if problem is not None:
        raise UserError(problem)


def place(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put the model on this process's device, shard it if `accelerate launch` says so, and give all the same adapter.

    Raises:
        UserError: FSDP is asked for in its first version.
    """
    state = this_process()
    if is_sharded(model):
        return  # by a run before this one
    model.to(state.device)
    for parameter in adapter.parameters():
        broadcast(parameter.data)
    if state.num_processes == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "FSDP's first version cannot train a part of a model. Pass --fsdp_version 2 to accelerate launch."
        )
    replicated = set() if 2 * adapter.trainable > adapter.total else set(adapter.parameters())
    for module in [*(model.get_submodule(name) for stack in blocks(model) for name in stack), model]:
        # what lies outside the blocks is sharded again as well, so that weights are read the same way at any time
        group = fully_shard(module, ignored_params=replicated, reshard_after_forward=True)
        group.set_gradient_divide_factor(1.0)  # gradients are summed, not averaged
        group.set_force_sum_reduction_for_comms(True)  # as gloo has no other way to


def summed(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    state = this_process()
    if state.num_processes == 1:
        return list(numbers)
    totals = torch.tensor(numbers, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(totals)
    return totals.tolist()


def sum_gradients(adapter: Adapter) -> None:
    """Sum the gradients over all processes; FSDP2 has done it for those that it sharded."""
    if this_process().num_processes == 1:
        return
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def in_turns(count: int, compute: Callable[[int], T]) -> list[T]:
    """The results of `compute(0)` to `compute(count - 1)`, each computed in one process and given to all.

    Every process calls `compute` equally often, since a sharded model needs all of them for each of its passes.
    """
    state = this_process()
    rounds = range(state.process_index, -(-count // state.num_processes) * state.num_processes, state.num_processes)
    results = dict(gather_object([(index, compute(min(index, count - 1))) for index in rounds]))
    return [results[index] for index in range(count)]


def get_weights(adapter: Adapter) -> dict[str, Tensor]:
    """Copies of everything that training goes on from, whole, on the CPU."""
    return {name: whole(tensor).to("cpu", copy=True) for name, tensor in adapter.named_state()}


def set_weights(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Put back what `get_weights` gave, here or in a run on more or fewer processes."""
    tensors = dict(adapter.named_state())
    adapter.load_state({name: _like(tensors[name], tensor) for name, tensor in weights.items()})


def get_moments(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's state as PARAMETER/MOMENT, whole, on the CPU."""
    return {
        f"{name}/{moment}": whole(value).to("cpu", copy=True)
        for name, parameter in adapter.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def set_moments(adapter: Adapter, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put back what `get_moments` gave, here or in a run on more or fewer processes."""
    parameters = dict(adapter.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        is_count = value.shape != parameter.shape
        optimizer.state[parameter][moment] = value.to(parameter.device) if is_count else _like(parameter, value)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on a parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
