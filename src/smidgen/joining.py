"""Updates of low rank of several adapters in one pass: every row of a batch with the factors of its own adapter.

Adapter by adapter, a layer would run a pair of small products for each, and copy its rows out and back in. Two batched
products over gathered factors take as long for two adapters as for one a row. They cost less than products with all
factors at once behind a mask, at the lengths and sizes that we tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, cast
from smidgen.layers import in_place, output_is_ours


def joined(deltas: Sequence[Delta], hidden: Tensor) -> list[Delta]:
    """Those of a layer's deltas that `add_by_row` can take: each the only one of its adapter, and a plain update.

    Args:
        deltas: that act on the layer's output, each on rows of its adapter.
        hidden: the output.
    """
    routes = [delta.service.route for delta in deltas]
    counts = Counter(route.name for route in routes if route is not None)
    found = [
        delta
        for delta, route in zip(deltas, routes, strict=True)
        if route is not None and counts[route.name] == 1 and delta.joins()
    ]
    return found if len(found) > 1 and hidden.dim() > 1 else []


def add_by_row(layer: nn.Module, deltas: Sequence[Delta], inputs: Tensor, hidden: Tensor) -> Tensor:
    """Hidden with the update of each row's adapter added; rows without one stay as they are.

    Args:
        layer: whose output it is; the sum takes its place where nothing else has seen it.
        deltas: of the adapters, which have `low_rank_factors`.
        inputs: of the layer, (rows, ..., in), or (rows · length, in).
        hidden: its output, likewise.
    """
    route = deltas[0].route
    assert route is not None
    factors = {delta.route.name: delta.low_rank_factors() for delta in deltas if delta.route is not None}
    ranks = {a.shape[0] for a, _, _ in factors.values()}
    if len(ranks) > 1:
        factors = {name: (*_filled(a, b, max(ranks)), scale) for name, (a, b, scale) in factors.items()}
    first, second, scale = next(iter(factors.values()))
    nothing = first, torch.zeros_like(second), scale  # of a row that none of them serves
    own = [factors.get(name, nothing) if name is not None else nothing for name in route.of_parts(hidden)]

    a, b = torch.stack([a for a, _, _ in own]), torch.stack([b for _, b, _ in own])
    rows = inputs.reshape(len(own), -1, inputs.shape[-1])
    low = torch.bmm(rows, cast(a, rows).transpose(1, 2))
    scales = [scale for _, _, scale in own]
    scale = scales[0]
    if len(set(scales)) > 1:  # a GPU would have to wait for these numbers
        low, scale = low * torch.tensor(scales, device=rows.device).view(-1, 1, 1), 1.0
    shape = len(own), rows.shape[1], hidden.shape[-1]
    add = in_place(hidden, *shape).baddbmm_ if output_is_ours(layer) else hidden.reshape(shape).baddbmm
    return add(cast(low, hidden), cast(b, hidden).transpose(1, 2), alpha=scale).view(hidden.shape)


def _filled(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of an update with zeros up to a rank."""
    missing = rank - len(a)
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
