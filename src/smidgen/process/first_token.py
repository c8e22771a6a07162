"""The last block's work for a classifier that reads the first token alone, as BERT's does: on that token alone.

Keys and values are needed of all tokens; what else the last block's linear layers compute, of the first one only. Of
six blocks that is an eighth of a training step's products, and nearly half of what is left above kept states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.hooks import active_deltas
from smidgen.modes import looking
from smidgen.remembered import once_a_model
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
    last = _last_block(model)
    layers: Layers = {}
    if last is not None and last.layers != {} and last.may_be_left_out(model):
        if last.layers is None and inputs["input_ids"].shape[1] > 1:
            last.layers = _tried(model, last, inputs)
        layers = last.layers or {}
    with _on_first_token(layers):
        yield


Layers = dict[nn.Module, bool]
"""Layers that compute the first token alone, and whether they must answer for all tokens, with zeros for the others."""


@dataclasses.dataclass
class _LastBlock:
    """The last of a model's blocks.

    Attributes:
        block: it.
        stack: whose last one it is, or was.
        layers: those that may compute the first token alone, none where more is read; None: the model was not tried.
    """

    block: nn.Module
    stack: nn.ModuleList
    layers: Layers | None = None

    def may_be_left_out(self, model: PreTrainedModel) -> bool:
        """Whether nothing in it looks at several tokens but its attention, now."""
        if model.dtype != torch.float32 or self.stack[-1] is not self.block:
            return False
        if "forward" in vars(self.block) or self.block._compiled_call_impl is not None:
            return False  # it is not computed at all, above kept states, or a graph without hooks of ours
        inside = list(self.block.modules())
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in inside):
            return False  # it would be computed again after the hooks are gone
        deltas = [delta for module in inside for delta in active_deltas(module)]
        return not any(delta.tap is not None or delta.route is not None for delta in deltas)


@once_a_model
def _last_block(model: nn.Module) -> _LastBlock | None:
    """None where there are several stacks of blocks, or none."""
    stacks = blocks(model)
    if len(stacks) != 1:
        return None
    stack = model.get_submodule(stacks[0][-1].rpartition(".")[0])
    assert isinstance(stack, nn.ModuleList)
    return _LastBlock(stack[-1], stack)


def _tried(model: PreTrainedModel, last: _LastBlock, inputs: Mapping[str, Any]) -> Layers:
    """The last block's linear layers, but those of keys and values, if the logits stay the same by the first token.

    An answer for the first token alone goes on to what comes next, and is added to residuals of all tokens, whose sums
    nothing reads; but attention needs a query of each token where some are padding.
    """
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
