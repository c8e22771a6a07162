"""Techniques that change while they are trained: they hear of every optimizer step, whatever loop makes it.

torch lets a hook listen to all optimizers. Ours looks whether the optimizer that steps trains a watched adapter. So a
schedule runs by itself, in our loop, in Trainer's and in a user's own, and no call can be forgotten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from smidgen.delta import Method

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


@dataclasses.dataclass
class Clock:
    """How far an adapter's training is.

    Attributes:
        step: optimizer steps that are done.
        steps: how many there will be, 1 or more; None: not known, which a schedule that needs it says.
    """

    step: int = 0
    steps: int | None = None

    def share(self, title: str) -> float:
        """The share of the steps that are done.

        Raises:
            RuntimeError: nobody said how many there will be.
        """
        if not self.steps:
            raise RuntimeError(
                f"{title} has a schedule over the whole training and does not know its length. Say it before the first "
                "step: adapter.clock.steps = 1000."
            )
        return min(1.0, self.step / self.steps)


_watched: weakref.WeakSet[Adapter] = weakref.WeakSet()


def watch(adapter: Adapter) -> None:
    """Let the adapter's techniques hear of the steps of whatever optimizer trains it, if one of them wants to."""
    if any(_listens(method) for method in adapter.methods):
        _watched.add(adapter)
        _listen_to_optimizers()


def forget(adapter: Adapter) -> None:
    """No longer let it hear of steps: it has left its model."""
    _watched.discard(adapter)


def schedule(adapter: Adapter) -> None:
    """Put the adapter in the state that its techniques' schedules have at its clock's step."""
    for method, deltas in zip(adapter.methods, adapter.deltas, strict=True):
        method.schedule(adapter, deltas)


def is_settled(adapter: Adapter) -> bool:
    """Whether the adapter's techniques have come to what was asked for: an epoch before is not the one to keep."""
    return all(
        method.is_settled(adapter, deltas) for method, deltas in zip(adapter.methods, adapter.deltas, strict=True)
    )


@contextlib.contextmanager
def unwatched(adapter: Adapter) -> Iterator[None]:
    """Inside, steps are trials that no schedule hears of."""
    was_watched = adapter in _watched
    _watched.discard(adapter)
    try:
        yield
    finally:
        if was_watched:
            _watched.add(adapter)


def _listens(method: Method) -> bool:
    kind = type(method)
    return kind.before_step is not Method.before_step or kind.schedule is not Method.schedule


@functools.cache
def _listen_to_optimizers() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: Optimizer, *_: Any) -> None:
    if _overflowed(optimizer):
        return
    for adapter in _trained_by(optimizer):
        with _unscaled(adapter, optimizer):
            for method, deltas in zip(adapter.methods, adapter.deltas, strict=True):
                method.before_step(adapter, deltas, optimizer)


def _after(optimizer: Optimizer, *_: Any) -> None:
    if _overflowed(optimizer):
        return
    for adapter in _trained_by(optimizer):
        adapter.clock.step += 1
        if adapter.service.active:
            schedule(adapter)


@contextlib.contextmanager
def _unscaled(adapter: Adapter, optimizer: Optimizer) -> Iterator[None]:
    """Inside, gradients are those of the loss, if a fused optimizer is to divide them by a GradScaler's factor yet."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        yield
        return
    gradients = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    try:
        yield
    finally:
        for gradient in gradients:
            gradient.mul_(scale)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told by a GradScaler that this step changes nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _trained_by(optimizer: Optimizer) -> list[Adapter]:
    """The adapters whose first parameter it trains: of several optimizers of one adapter, one is its clock."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [adapter for adapter in _watched if id(next(adapter.parameters(), None)) in trained]
