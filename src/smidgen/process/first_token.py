"""The last block's work for a classifier that reads the first token alone, as BERT's does: on that token alone.

Keys and values are needed of all tokens; what else the last block's linear layers compute, of the first one only. Of
six blocks that is an eighth of a training step's products, and nearly half of what is left above kept states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.hooks import Deltas, active_deltas
from smidgen.layers import is_sharded
from smidgen.modes import looking
from smidgen.own import OwnParameters
from smidgen.targets import blocks, find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
"""How far logits may be apart, over their size: as far as a product of fewer rows may round otherwise."""


@contextlib.contextmanager
def reading_first_token(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the last block computes what is read of it alone, if that was seen to be the first token.

    Args:
        model: with a classifier of whole texts.
        inputs: what it will be called with, (rows, length) each, on which it is tried, once.
    """
    last = _known.get(model)
    if last is None or not last.is_still(model):
        last = _known[model] = _LastBlock.of(model)
    layers: Layers = {}
    if last.layers != {} and last.may_be_left_out(model):
        if last.layers is None and inputs["input_ids"].shape[1] > 1:
            last.layers = _tried(model, last, inputs)
        layers = last.layers or {}
    with _on_first_token(layers):
        yield


Layers = dict[nn.Module, bool]
"""Layers that compute the first token alone, and whether they must answer for all tokens, with zeros for the others."""


@dataclasses.dataclass
class _LastBlock:
    """The last of a model's blocks, as long as it and what is outside of the blocks are the same modules.

    Attributes:
        stack: of the blocks; None: there are several, or none.
        parts: the modules of the last block, and those outside of the stack.
        layers: those that may compute the first token alone, none where more is read; None: the model was not tried.
    """

    stack: nn.ModuleList | None
    parts: list[nn.Module]
    layers: Layers | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> _LastBlock:
        """A model's."""
        stacks = [] if is_sharded(model) else blocks(model)  # each process would try it by its own rows
        if len(stacks) != 1:
            return cls(None, [], layers={})
        stack = model.get_submodule(stacks[0][-1].rpartition(".")[0])
        assert isinstance(stack, nn.ModuleList)
        return cls(stack, _parts(model, stack))

    @property
    def block(self) -> nn.Module:
        """The block."""
        assert self.stack is not None
        return self.stack[-1]

    def is_still(self, model: PreTrainedModel) -> bool:
        """Whether the model has the parts that it had."""
        now = _parts(model, self.stack) if self.stack is not None else []
        return len(now) == len(self.parts) and all(map(operator.is_, now, self.parts))

    def may_be_left_out(self, model: PreTrainedModel) -> bool:
        """Whether nothing in it looks at several tokens but its attention, now."""
        if model.dtype != torch.float32 or "forward" in vars(self.block) or self.block._compiled_call_impl is not None:
            return False  # it is not computed at all, above kept states, or a graph without hooks of ours
        inside = list(self.block.modules())
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in inside):
            return False  # it would be computed again after the hooks are gone
        deltas = [delta for module in inside for delta in active_deltas(module)]
        return not any(delta.tap is not None or delta.route is not None for delta in deltas)


def _parts(model: nn.Module, stack: nn.ModuleList) -> list[nn.Module]:
    """The model's own modules below it, of the blocks the last one's alone."""
    found: list[nn.Module] = []
    waiting = list(model._modules.values())
    while waiting:
        module = waiting.pop()
        if module is stack:
            waiting.append(stack[-1])
        elif module is not None and not isinstance(module, Deltas | OwnParameters):
            found.append(module)
            waiting += module._modules.values()
    return found


_known: weakref.WeakKeyDictionary[nn.Module, _LastBlock] = weakref.WeakKeyDictionary()
"""Of each model that was asked about."""


def _tried(model: PreTrainedModel, last: _LastBlock, inputs: Mapping[str, Any]) -> Layers:
    """The last block's linear layers, but those of keys and values, if the logits stay the same by the first token.

    An answer for the first token alone goes on to what comes next, and is added to residuals of all tokens, whose sums
    nothing reads; but attention needs a query of each token where some are padding.
    """
    assert last.stack is not None
    number = str(len(last.stack) - 1)
    try:
        whole = {place.name for place in find(model, "keys-and-values", number)}
        layers = [place.layer for place in find(model, "all-linear", number) if place.name not in whole]
    except ValueError:  # experts, or an attention whose layers have other names
        return {}
    mask = inputs["attention_mask"].clone()
    mask[:1, -1:] = 0
    padded = {**inputs, "attention_mask": mask}
    with looking(model):
        expected = model(**padded).logits
        with contextlib.ExitStack() as stack:
            stack.callback(last.block.register_forward_hook(_without_first).remove)
            other = model(**padded).logits

        def are_same(layers: Layers) -> bool:
            with contextlib.suppress(RuntimeError), _on_first_token(layers) as called:  # of sizes that do not fit
                return _close(model(**padded).logits, expected) and called.keys() == layers.keys()
            return False

        if _close(other, expected):
            return {}
        query, *others = layers
        for filled in ([query], [query, *others]):
            if are_same(found := {layer: layer in filled for layer in layers}):
                return found
    return {}


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())


@contextlib.contextmanager
def _on_first_token(layers: Layers) -> Iterator[dict[nn.Module, int]]:
    """Inside, layers compute the first token of (rows, length, size) alone.

    What it gives are the lengths that they were called with.
    """
    lengths: dict[nn.Module, int] = {}

    def take(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lengths[layer] = inputs[0].shape[1]
        return (inputs[0][:, :1].contiguous(), *inputs[1:])  # strided, each row would copy the weight

    def fill(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.pad(output, (0, 0, 0, lengths[layer] - 1))

    with contextlib.ExitStack() as stack:
        for layer, answers_for_all in layers.items():
            stack.callback(layer.register_forward_pre_hook(take).remove)
            if answers_for_all:
                stack.callback(layer.register_forward_hook(fill).remove)  # after the deltas'
        yield lengths


def _without_first(block: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook: a block's output with zeros at the first token."""
    states = output[0] if isinstance(output, tuple) else output
    changed = torch.cat([torch.zeros_like(states[:, :1]), states[:, 1:]], 1)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed
