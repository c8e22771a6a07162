"""Deltas in a model: the hooks that run those of a layer, put there and removed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.delta import Delta, Side
from smidgen.joining import add_by_row, joined
from smidgen.threads import PerThread


class Deltas(nn.Module):
    """The deltas of one layer, in the order in which they act; a child's name is ADAPTER:TECHNIQUE."""

    handle: RemovableHandle | None = None
    input_handle: RemovableHandle | None = None

    def active(self) -> list[Delta]:
        """Those that act now: asked at every call of the layer, so a hundred idle ones must cost next to nothing."""
        return [delta for delta in self._modules.values() if delta.service.active]  # type: ignore[union-attr,misc]


class Tap:
    """Remembers what went into an earlier layer of a sublayer, for a delta at its end.

    A forward pre-hook. The tensor is let go of when the delta takes it, so that nothing is kept beyond a pass, but for
    one that an error ended in between: the next pass lets go of that.
    """

    def __init__(self, layer: nn.Module, delta: Delta) -> None:
        self.delta = delta
        self._inputs: PerThread[tuple[Any, ...] | None] = PerThread(None)
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remember the layer's positional arguments."""
        if self.delta.active:
            self._inputs.set(inputs)

    def take(self) -> tuple[Any, ...]:
        """What went in since the last call."""
        inputs = self._inputs.reset()
        if inputs is None:
            raise RuntimeError("A sublayer's end ran without its start; the model does not call its layers in order.")
        return inputs


class Batch:
    """Whose adapter each row has, of the batches that come.

    Args:
        names: an adapter's name, or None, for each row.

    Attributes:
        rows: of the batch that is computed now; beams make several of each name's, one after the other.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.rows = len(self.names)


class Route:
    """Which rows of a batch an adapter serves.

    Args:
        name: the adapter's.
        batch: whose rows have which adapter.
    """

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.batch = name, batch

    def served(self, states: Tensor) -> list[int]:
        """The numbers of its rows.

        Args:
            states: of the batch's rows, or of their tokens, see `of_rows`.

        Raises:
            ValueError: see `of_rows`.
        """
        return [row for row, name in enumerate(self.of_rows(states)) if name == self.name]

    def of_rows(self, states: Tensor) -> list[str | None]:
        """The name of each row's adapter, or None.

        Args:
            states: (rows, ...), or (rows · length, size) where a layer gets the tokens of all rows in one list.

        Raises:
            ValueError: they are not those of the batch's rows.
        """
        names = self.of_parts(states)
        return [name for name in names for _ in range(states.shape[0] // len(names))]

    def of_parts(self, states: Tensor) -> list[str | None]:
        """The names of as many equal parts of the rows, or of their tokens, as there are texts; of one, if it is alone.

        Args:
            states: see `of_rows`.

        Raises:
            ValueError: see `of_rows`.
        """
        alone, count = _alone.get(), states.shape[0]
        if alone is not None:
            return [alone]
        if count != self.batch.rows and (states.dim() > 2 or count % self.batch.rows):
            raise ValueError(
                f"rows names adapters for {len(self.batch.names)} rows, and a layer that adapter {self.name!r} changes "
                f"computes {count}. Give a name for each row; what is computed once for all rows cannot differ between "
                "them."
            )
        return list(self.batch.names)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, a batch is of this adapter's rows alone."""
        before = _alone.get()
        _alone.set(self.name)
        try:
            yield
        finally:
            _alone.set(before)


_alone: PerThread[str | None] = PerThread(None)


def put(layer: nn.Module, key: str, delta: Delta, *, side: Side | None, source: nn.Module | None) -> None:
    """Make `delta` the last of the layer's deltas.

    Args:
        layer: where it goes.
        key: its name among the layer's deltas.
        delta: its mode, training or evaluation, becomes the layer's.
        side: what of the layer it changes, by a hook; None: the attention or the prompt looks for it.
        source: the layer whose input it reads, if it is not `layer` itself.
    """
    deltas = getattr(layer, "deltas", None)
    if not isinstance(deltas, Deltas):
        layer.deltas = deltas = Deltas()
    if side == "output" and deltas.handle is None:
        deltas.handle = layer.register_forward_hook(run_deltas)
    if side == "input" and deltas.input_handle is None:
        deltas.input_handle = layer.register_forward_pre_hook(run_input_deltas)
    delta.side = side
    deltas.add_module(key, delta)
    delta.train(layer.training)
    if source is not None:
        delta.tap = Tap(source, delta)


def remove(layer: nn.Module, key: str) -> None:
    """Take a delta off again; the layer is as it was when its last one is gone."""
    deltas = layer.deltas
    assert isinstance(deltas, Deltas)
    delta = deltas._modules.pop(key)
    assert isinstance(delta, Delta)
    if delta.tap is not None:
        delta.tap.handle.remove()
        delta.tap = None
    if not list(deltas.children()):
        for handle in (deltas.handle, deltas.input_handle):
            if handle is not None:
                handle.remove()
        del layer.deltas


def active_deltas(layer: nn.Module, side: Side | None = None) -> list[Delta]:
    """The deltas that act on this layer now, in their order; with a side, those on it alone."""
    deltas = getattr(layer, "deltas", None)
    if not isinstance(deltas, Deltas):
        return []
    active = [delta for delta in deltas.active() if side is None or delta.side == side]
    return sorted(active, key=lambda delta: delta.service.order) if len(active) > 1 else active


def run_deltas(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The one forward hook: passes a layer's output (a tuple's first part) through its active deltas."""
    hidden = output[0] if isinstance(output, tuple) else output
    deltas = active_deltas(layer, "output")
    together = joined(deltas, hidden) if len(deltas) > 1 else []
    if together:
        hidden = add_by_row(layer, together, inputs[0], hidden)
    for delta in deltas if len(together) < len(deltas) else ():
        if delta not in together:
            hidden = _run(delta, layer, inputs if delta.tap is None else delta.tap.take(), hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def run_input_deltas(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The one forward pre-hook: passes a layer's first input through the active deltas of its input."""
    deltas = active_deltas(layer, "input")
    if not deltas:
        return inputs
    if not inputs:
        raise RuntimeError(f"A {type(layer).__name__} is called without positional arguments; its input has no delta.")
    hidden = inputs[0]
    for delta in deltas:
        hidden = _run(delta, layer, inputs, hidden)
    return (hidden, *inputs[1:])


def taken(value: Any, index: Tensor, batch: int) -> Any:
    """The rows `index` of an argument that has a row for each of the batch; others as they are."""
    return value[index] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value


def _run(delta: Delta, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """The delta's result on the rows that it serves; others stay as they are."""
    if delta.route is None:
        return delta(layer, inputs, hidden)  # type: ignore[no-any-return]
    served = delta.route.served(hidden)
    if not served:
        return hidden
    if len(served) == hidden.shape[0]:
        return delta(layer, inputs, hidden)  # type: ignore[no-any-return]
    index = torch.tensor(served, device=hidden.device)
    own = tuple(taken(value, index, hidden.shape[0]) for value in inputs)
    return hidden.index_copy(0, index, delta(layer, own, hidden[index]).to(hidden.dtype))
