"""Learning rates: an adapter's parameters as the groups that a torch optimizer takes, each with its own rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


def parameter_groups(
    adapter: Adapter,
    learning_rate: float | Sequence[float],
    *,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """What `adapter` trains, with the rates that its techniques ask for: AdamW(parameter_groups(adapter, 1e-3)).

    Args:
        adapter: what is trained.
        learning_rate: one for all its techniques, or one for each; some let a part of theirs learn faster or slower.
        head_learning_rate: of the task's head; None: the first technique's.
        weight_decay: of matrices; biases, norms and other vectors do not decay.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, the head's last.

    Raises:
        ValueError: there are not as many rates as techniques.
    """
    rates = [learning_rate] * len(adapter.methods) if isinstance(learning_rate, (int, float)) else list(learning_rate)
    if len(rates) != len(adapter.methods):
        raise ValueError(
            f"learning_rate={learning_rate} has {len(rates)} rates for {len(adapter.methods)} techniques. Give one for "
            "each, or one for all."
        )
    owners = _owners(adapter)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        is_head = name in adapter.head_names
        rate = rates[owners.get(name, 0)]
        if is_head and head_learning_rate is not None:
            rate = head_learning_rate
        rate *= math.prod(method.rate_ratio(adapter.model, name) for method in adapter.methods)
        groups.setdefault((is_head, -rate, parameter.dim() > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": -rate, "weight_decay": weight_decay * decays}
        for (_, rate, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def _owners(adapter: Adapter) -> dict[str, int]:
    """The number of the technique that trains each parameter; the head is nobody's."""
    owners: dict[str, int] = {}
    for number, method in reversed(list(enumerate(adapter.methods))):
        own = (name for name in method.own_parameters(adapter.model) if name not in adapter.head_names)
        owners.update(dict.fromkeys(own, number))
        for place, delta in zip(adapter.places[number], adapter.deltas[number], strict=True):
            owners.update({f"{place.name}.{method.name}.{name}": number for name, _ in delta.named_parameters()})
    return owners
