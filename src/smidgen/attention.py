"""Deltas in attention: learned keys and values joined to a layer's own before the kernel runs.

transformers lets a model's attention be any registered function. Ours stands in front of the model's own kernel and
adds the active deltas' keys and values, which every query may attend to. Nothing goes through the cache, so that
every cache class, beam search and gradient checkpointing work as they do without a prefix.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smidgen.delta import Delta
from smidgen.hooks import active_deltas
from smidgen.modes import looking
from smidgen.targets import Place, choose_blocks
from smidgen.threads import PerThread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNELS = ("sdpa", "eager")
"""The kernels that a prefix can be put before."""

_PREFIX = "smidgen_"
_seen: PerThread[list[tuple[nn.Module, Tensor, Tensor]] | None] = PerThread(None)  # what `watch` collects


def install(model: PreTrainedModel) -> None:
    """Put our attention function in front of the model's own; a second call changes nothing.

    Raises:
        ValueError: the model's attention cannot be replaced, or its kernel is not one of `KERNELS`.
    """
    kernel = model.config._attn_implementation
    if kernel.startswith(_PREFIX):
        _register(kernel.removeprefix(_PREFIX))  # a model from a pickle comes to a process that has not done it
        return
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself (it does not use transformers' "
            "AttentionInterface), so that no prefix can be joined to its keys and values. Prompt tuning, LoRA and "
            "adapters work on it."
        )
    if kernel not in KERNELS:
        raise ValueError(
            f"attn_implementation={kernel!r} cannot take a prefix. Load the model with attn_implementation="
            f"{' or '.join(map(repr, KERNELS))}."
        )
    model.set_attn_implementation(_register(kernel))


@functools.cache
def _register(kernel: str) -> str:
    """Make our function in front of a kernel known to transformers, once a process; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _PREFIX + kernel
    AttentionInterface.register(name, functools.partial(attend, kernel))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[kernel])
    return name


def uninstall(model: PreTrainedModel) -> None:
    """Give the model its own attention function back."""
    kernel = model.config._attn_implementation
    if kernel.startswith(_PREFIX):
        model.set_attn_implementation(kernel.removeprefix(_PREFIX))


def attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the model's own kernel on keys and values that begin with the active deltas', and beside it on gated ones.

    Args:
        kernel: "sdpa" or "eager".
        module: the attention that calls.
        query: (batch, heads, queries, head size).
        key: (batch, key-value heads, keys, head size).
        value: the same shape as `key`.
        attention_mask: None, or (batch or 1, heads or 1, queries, keys): boolean (True: may attend) or additive.
        **arguments: transformers' own, passed on.

    Returns:
        The output (batch, queries, heads, head size), and the weights where the kernel gives them.
    """
    seen = _seen.get()
    if seen is not None:
        seen.append((module, key, value))
    beside: list[tuple[Tensor, Tensor, Tensor]] = []
    for delta in reversed(active_deltas(module)):
        prefix_key, prefix_value = delta(key.shape[0])
        served = _served(delta, key)
        gate = delta.gated(query)
        if gate is not None:
            gate = gate if served is None else gate * served.view(-1, 1, 1, 1)
            beside.append((gate, prefix_key.to(key.dtype), prefix_value.to(value.dtype)))
            continue
        if attention_mask is None and kernel == "sdpa" and _is_causal(module, query, arguments):
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # an empty static cache is longer
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
            attention_mask = attention_mask[None, None]
        if attention_mask is None and served is not None:
            attention_mask = key.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        attention_mask = _widen(attention_mask, prefix_key.shape[2], served)
        if arguments.get("position_bias") is not None:
            arguments["position_bias"] = nn.functional.pad(arguments["position_bias"], (prefix_key.shape[2], 0))
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
    run = _kernel(kernel, module)
    output, weights = run(module, query, key, value, attention_mask, **arguments)
    own = {**arguments, "is_causal": False, "position_bias": None}
    for gate, prompt_key, prompt_value in beside:
        output = output + gate.to(output.dtype) * run(module, query, prompt_key, prompt_value, None, **own)[0]
    return output, weights


def _is_causal(module: nn.Module, query: Tensor, arguments: dict[str, Any]) -> bool:
    causal = arguments.get("is_causal")
    return query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)


def _served(delta: Delta, key: Tensor) -> Tensor | None:
    """Which rows the delta serves, (batch,); None: all."""
    if delta.route is None:
        return None
    served = set(delta.route.served(key))
    return torch.tensor([row in served for row in range(key.shape[0])], device=key.device)


def _widen(mask: Tensor | None, columns: int, served: Tensor | None) -> Tensor | None:
    """The mask with `columns` more keys at its front that the queries of the rows `served` may attend to."""
    if mask is None:
        return None
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    front = mask.new_full((mask.shape[0], mask.shape[1], mask.shape[2], columns), mask.dtype == torch.bool)
    if served is not None:
        mask = mask.expand(len(served), -1, -1, -1)
        front = front.expand(len(served), -1, -1, -1).masked_fill(~served.view(-1, 1, 1, 1), hidden)
    return torch.cat([front, mask], dim=3)


def _kernel(kernel: str, module: nn.Module) -> Callable[..., Any]:
    from transformers import AttentionInterface

    if kernel == "eager":  # each model's file has its own
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return AttentionInterface()[kernel]  # type: ignore[no-any-return]


def find(model: PreTrainedModel, layers: str = "all") -> list[Place]:
    """The attentions inside the blocks that `layers` names, found by running the model on two tokens or an empty image.

    Running it is the only description that cannot be wrong: every module that calls the attention function is seen,
    with the shape of its keys.

    Raises:
        ValueError: the model's attention takes no prefix, or no attention lies inside the blocks.
    """
    names = {module: name for name, module in model.named_modules()}
    inside = tuple(f"{block}." for block in choose_blocks(model, layers))
    places: dict[str, Place] = {}
    for module, key, value in watch(model, _smallest_inputs(model)):
        name, shapes = names[module], (key.shape[1::2], value.shape[1::2])
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} of {type(model).__name__} has keys of {tuple(shapes[0])} heads and numbers a head, and values "
                f"of {tuple(shapes[1])}; a prefix has both alike. Prompt tuning, LoRA and adapters work on it."
            )
        if name.startswith(inside):
            places[name] = Place(name, module, (key.shape[1], key.shape[3]), site="attention")
    if without := [block for block in inside if not any(name.startswith(block) for name in places)]:
        raise ValueError(
            f"No attention of {without[0].removesuffix('.')} and {len(without) - 1} other blocks of "
            f"{type(model).__name__} takes a prefix: they have none, or compute it by themselves. Prompt tuning, LoRA "
            "and adapters work on them."
        )
    return list(places.values())  # a block that runs several times, as ALBERT's, is one place


def text_inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What the model takes to read `tokens`, (1, length); an encoder-decoder answers with the same ones."""
    inputs = {"input_ids": tokens}
    return inputs | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def _smallest_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two tokens, or an empty image."""
    if model.main_input_name == "input_ids":
        return text_inputs(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))
    size = getattr(model.config, "image_size", None)
    if model.main_input_name != "pixel_values" or size is None:
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}; prefixes go into models of text and images so far."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width).to(model.device, model.dtype)}


def watch(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Run the model on one row: each attention that ran, its keys and values, (1, heads, length, head size)."""
    before = model.config._attn_implementation
    install(model)
    try:
        with looking(model), _watching() as seen:
            model.base_model(**inputs)  # a head may want more of them, such as an end of text
    finally:
        if before != model.config._attn_implementation:
            uninstall(model)
    return seen


@contextlib.contextmanager
def _watching() -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset()
