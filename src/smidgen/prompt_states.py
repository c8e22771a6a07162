"""A decoder's prompt computed once for all rows of a batch, and for several batches: it sees nothing of the texts.

Its keys and values go into the cache with which the texts are then read. A gradient needs each row's own, and so do
rows with prompts of their own; what a batch gives is the same, to the rounding of fewer rows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from smidgen.threads import PerThread

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_kept: PerThread[dict[tuple[int, str], DynamicCache] | None] = PerThread(None)


@contextlib.contextmanager
def prompts_kept() -> Iterator[None]:
    """Inside, a prompt is computed once, and not for each batch: nothing that it follows from may change."""
    before = _kept.get()
    _kept.set({})
    try:
        yield
    finally:
        _kept.set(before)


def can_be_shared(inputs: dict[str, Any], count: int) -> bool:
    """Whether a decoder's forward pass with these arguments may begin after `count` virtual tokens that are cached.

    Args:
        inputs: with the texts' ids (rows, length), or with the placeholders' before them.
        count: virtual tokens of each row.
    """
    from transformers import DynamicCache

    cache = inputs.get("past_key_values")
    kept = _kept.get() is not None
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (kept or inputs["input_ids"].shape[0] > 1)
        and (cache is None or type(cache) is DynamicCache)
        and inputs.get("labels") is None  # the prompt's last token may have the text's first to learn
        and not inputs.get("output_hidden_states")
        and not inputs.get("output_attentions")
    )


def put(
    model: PreTrainedModel, inputs: dict[str, Any], compute: Callable[[DynamicCache], object], adapters: str
) -> None:
    """Give a forward pass a cache that holds the prompt for each of its rows.

    Args:
        model: a decoder.
        inputs: the arguments, in which the cache is set.
        compute: fills an empty cache by a forward pass over the prompt, in one row.
        adapters: which are active.
    """
    from transformers import DynamicCache

    kept, key = _kept.get(), (id(model), adapters)
    states = None if kept is None else kept.get(key)
    if states is None:
        states = DynamicCache(config=model.config)
        compute(states)
        if kept is not None:
            kept[key] = states
    own = copy.deepcopy(states)
    own.batch_repeat_interleave(inputs["input_ids"].shape[0])
    if inputs.get("past_key_values") is not None:  # generate's own, still empty
        inputs["past_key_values"].layers = own.layers
    else:
        inputs["past_key_values"] = own
