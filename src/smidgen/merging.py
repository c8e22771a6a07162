"""Writing an adapter into the weights of its model: whether that can be done, and in which order."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from smidgen.delta import Delta
from smidgen.layers import is_quantized
from smidgen.stacking import adapters
from smidgen.targets import Place

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


def check_mergeable(adapter: Adapter) -> None:
    """Raise a ValueError if the adapter cannot be merged.

    One of its techniques is not an update of a weight, a weight is quantized or tied, or another adapter is
    attached, which was trained without this one.
    """
    fixed = dict.fromkeys(method.title for method, _, delta in adapter.entries() if not delta.mergeable)
    if fixed:
        raise ValueError(
            f"{' and '.join(fixed)} cannot be merged into the weights: it adds computation, not an update of a "
            "weight. Keep the adapter attached."
        )
    others = [name for name in adapters(adapter.model) if name != adapter.name]
    if others:
        raise ValueError(f"Detach the other adapters before merging {adapter.name!r}: {', '.join(others)}.")
    shared = Counter(id(p) for _, p in adapter.model.named_parameters(remove_duplicate=False))
    for _, place, _ in adapter.entries():
        if is_quantized(place.layer):
            raise ValueError(
                f"{place.name} is quantized, and no update can be added to its weight. Load the model unquantized, "
                "or keep the adapter attached."
            )
        if shared[id(place.layer.weight)] > 1:
            raise ValueError(
                f"{place.name}'s weight is tied to another layer's, which merging would change too. Untie them, or "
                "keep the adapter attached."
            )


def in_order(adapter: Adapter) -> list[tuple[Place, Delta]]:
    """The deltas in the order in which they can be written into a weight: those of the input last, backwards.

    What acts on the output computes from the input as the others have changed it: W R2 R1 x + U R2 R1 x.
    """
    found = [(place, delta) for _, place, delta in adapter.entries()]
    outputs = [entry for entry in found if entry[1].side == "output"]
    return outputs + [entry for entry in reversed(found) if entry[1].side == "input"]


@torch.no_grad()
def write(adapter: Adapter) -> None:
    """Add what the deltas do to the weights of their layers."""
    for place, delta in in_order(adapter):
        delta.merge(place.layer)
