"""Deltas in a model: the one forward hook that runs those of a layer, and the model as it is without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from smidgen.delta import Delta
from smidgen.threads import PerThread


class Deltas(nn.Module):
    """The deltas of one layer, in the order in which they act; a child's name is ADAPTER:TECHNIQUE."""

    handle: RemovableHandle | None = None


class Tap:
    """Remembers what went into an earlier layer of a sublayer, for a delta at its end.

    A forward pre-hook. The tensor is let go of when the delta takes it, so that nothing is kept beyond one pass.
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


def put(layer: nn.Module, key: str, delta: Delta, *, runs_on_output: bool, source: nn.Module | None) -> None:
    """Make `delta` the last of the layer's deltas.

    Args:
        layer: where it goes.
        key: its name among the layer's deltas.
        delta: its mode, training or evaluation, becomes the layer's.
        runs_on_output: whether the layer's forward hook runs it; otherwise the attention or the prompt looks for it.
        source: the layer whose input it reads, if it is not `layer` itself.
    """
    deltas = getattr(layer, "deltas", None)
    if not isinstance(deltas, Deltas):
        layer.deltas = deltas = Deltas()
    if runs_on_output and deltas.handle is None:
        deltas.handle = layer.register_forward_hook(run_deltas)
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
        if deltas.handle is not None:
            deltas.handle.remove()
        del layer.deltas


def active_deltas(layer: nn.Module) -> list[Delta]:
    """The deltas that act on this layer now, in their order."""
    deltas = getattr(layer, "deltas", None)
    if not isinstance(deltas, Deltas):
        return []
    return [delta for delta in deltas.children() if isinstance(delta, Delta) and delta.active]


def run_deltas(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The one forward hook: passes a layer's output (a tuple's first part) through its active deltas."""
    hidden = output[0] if isinstance(output, tuple) else output
    for delta in active_deltas(layer):
        hidden = delta(layer, inputs if delta.tap is None else delta.tap.take(), hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name: what adapters have added to it is left out."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Deltas):
            inside = (*inside, f"{name}.")
        elif not name.startswith(inside):
            yield name, module


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters by name, each once: what adapters have added to it is left out."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Deltas))
    return ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside or "\0"))
