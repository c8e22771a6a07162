"""An adapter's change of each weight: as a matrix, or as the product of low rank that is nearest to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smidgen import merging
from smidgen.layers import weight_matrix

if TYPE_CHECKING:
    from smidgen.adapter import Adapter
    from smidgen.delta import Delta

Factors = tuple[Tensor, Tensor, float]
"""A (rank, in), B (out, rank) and s of an update s · B A."""


@torch.no_grad()
def changes(adapter: Adapter) -> dict[str, Tensor]:
    """What merging the adapter would add to each weight, (out, in), in fp32, by the layer's name.

    Raises:
        ValueError: it is more than a change of weights, or changes biases too.
    """
    if fixed := [method.title for method, _, delta in adapter.entries() if not delta.mergeable]:
        raise ValueError(f"{fixed[0]} of adapter {adapter.name!r} is more than a change of weights.")
    found: dict[str, Tensor] = {}
    for name, layer in {place.name: place.layer for _, place, _ in adapter.entries()}.items():
        try:
            found[name] = change(layer, [delta for place, delta in merging.in_order(adapter) if place.name == name])
        except ValueError as error:
            raise ValueError(f"Adapter {adapter.name!r} at {name}: {error}") from error
    return found


@torch.no_grad()
def change(layer: nn.Module, deltas: Sequence[Delta]) -> Tensor:
    """What merging a layer's deltas would add to its weight, (out, in), in fp32.

    Args:
        layer: left as it is.
        deltas: that can be merged, in the order in which they are.

    Raises:
        ValueError: they change its bias too.
    """
    merged = copy.deepcopy(layer).float()
    for delta in deltas:
        delta.merge(merged)
    before, after = getattr(layer, "bias", None), getattr(merged, "bias", None)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before.float(), after):
        raise ValueError("its bias is changed too, and LoRA changes none.")
    return weight_matrix(merged) - weight_matrix(layer).float()


@torch.no_grad()
def nearest(updates: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Factors], float]:
    """The products of `rank` nearest to the updates, and what they lose: a ratio of Frobenius norms over all."""
    found: dict[str, Factors] = {}
    whole = lost = 0.0
    for name, update in updates.items():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        roots = values[:rank].sqrt()
        found[name] = (roots[:, None] * right[:rank], left[:, :rank] * roots, 1.0)
        whole += float(values.square().sum())
        lost += float(values[rank:].square().sum())
    return found, (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def compact(factors: Factors) -> Factors:
    """The same update with a rank no larger than the layer's smaller side."""
    a, b, scale = factors
    size = min(a.shape[1], b.shape[0])
    if a.shape[0] <= size:
        return factors
    return nearest({"": scale * (b.float() @ a.float())}, size)[0][""]
