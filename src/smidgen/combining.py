"""New adapters from those that are on a model: their weighted sum, their mean, and merges that let them interfere less.

A sum is of the changes that the adapters make to each weight, not of their factors: the product of two summed factors
is not the sum of the products. Of low-rank updates it is exact, with the sum of their ranks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from smidgen.adapter import Adapter
from smidgen.attaching import alone, check_name
from smidgen.delta import Delta, Method
from smidgen.methods import LoRA
from smidgen.methods.low_rank import LowRankDelta
from smidgen.stacking import named_adapters, set_labels
from smidgen.targets import Place, exact
from smidgen.updates import Factors, changes, compact, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["sum", "mean", "ties", "dare"]


def combine(
    model: PreTrainedModel,
    weights: Mapping[str, float],
    *,
    name: str,
    how: How = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    """A new adapter made of adapters that are on the model; it is active then, and the others stay as they are.

    - `sum`: of each weight's changes, every one times its weight. Low-rank updates give a LoRA of the sum of their
      ranks, exactly; others, or a given `rank`, the nearest LoRA of that rank.
    - `mean`: of the parameters, for adapters of the same techniques and sizes (bottlenecks, prompts, prefixes); the
      weights are divided by their sum.
    - `ties` (Yadav et al., 2023, arXiv:2306.01708): each adapter's change is cut to its largest numbers, over all its
      matrices together, a sign is elected for each place, and those that agree with it are averaged, by their weights:
      twice the weights give the same (the paper's λ is 1).
    - `dare` (Yu et al., 2024, arXiv:2311.03099): each change keeps a random share of its numbers, enlarged by as much,
      and they are summed.

    The model's own parameters that all of them trained, such as heads, get the same treatment. One adapter with weight
    1 gives that adapter, exactly, however it is combined.

    Args:
        model: the model that the adapters are on.
        weights: each adapter's weight, by name.
        name: the new adapter's.
        how: the combination.
        rank: of the LoRA that `ties` and `dare` give, or a `sum` that has no exact one; what it has no room for is in
            the new adapter's `lost`.
        density: the share of the numbers that `ties` and `dare` keep; 0.2 by default.
        seed: of the numbers that `dare` keeps.

    Raises:
        ValueError: an adapter is not there, they do not go together, or a value is outside its range.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f'combine takes names with their weights, such as {{"a": 0.5, "b": 0.5}}; got {weights!r}.')
    members = _members(model, weights)
    for member, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"The weight of {member!r} must be a finite number, got {weight!r}.")
    check_name(model, name)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if how not in get_args(How):
        raise ValueError(f"how must be one of {', '.join(get_args(How))}, got {how!r}.")
    if density is not None and how not in ("ties", "dare"):
        raise ValueError(f"density={density} is what ties and dare keep; how={how!r} keeps everything.")
    density = 0.2 if density is None else density
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}.")
    shares = list(weights.values())
    if how == "mean":
        if not sum(shares):
            raise ValueError(f"The weights {shares} sum to 0, so that there is no mean.")
        shares = [share / sum(shares) for share in shares]
    labels = members[0].labels if members[0].head_names else None
    with alone(model):  # what weights change is their change of the base model's
        own, lost = _own(members, shares, how, density, seed), 0.0
        if (len(members) == 1 and shares == [1.0]) or not any(found for member in members for found in member.places):
            made = _copied(members[0])
        elif how == "mean":
            made = _mean(members, shares)
        else:
            factors, lost = _factors(members, shares, how, rank, density, seed)
            made = _as_lora(model, factors)
        adapter = Adapter(model, name, *made, list(own))
    adapter.lost = lost
    theirs, parameters = dict(members[0].named_parameters()), dict(adapter.named_parameters())
    for key, value in own.items():
        parameters[key].data = value.to(theirs[key].dtype, copy=True)
    if labels:
        set_labels(model, labels)
    return adapter


Made = tuple[list[Method], list[list[Place]], list[list[Delta]]]


def _members(model: PreTrainedModel, weights: Mapping[str, float]) -> list[Adapter]:
    if not weights:
        raise ValueError("combine needs at least one adapter's name and weight; it got none.")
    members = named_adapters(model, weights)
    first = members[0]
    for other in members[1:]:
        if other.own_names != first.own_names:
            raise ValueError(
                f"Adapters {first.name!r} and {other.name!r} do not train the same of the model's parameters."
            )
        if first.head_names and other.labels != first.labels:
            raise ValueError(
                f"Adapters {first.name!r} and {other.name!r} have heads for different labels: {first.labels} and "
                f"{other.labels}."
            )
    return members


def _copied(member: Adapter) -> Made:
    taps: dict[int, object] = {id(delta.tap): None for _, _, delta in member.entries() if delta.tap is not None}
    built = copy.deepcopy([list(deltas) for deltas in member.deltas], taps)  # a new adapter sets taps of its own
    return list(member.methods), [list(found) for found in member.places], built


def _mean(members: Sequence[Adapter], shares: Sequence[float]) -> Made:
    first = members[0]
    if products := [method.title for method, _, delta in first.entries() if delta.mergeable]:
        raise ValueError(
            f"{products[0]} changes weights by a product, and the product of mean factors is not the mean of the "
            "changes. Use how='sum' with weights that sum to 1."
        )
    shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
    for other in members[1:]:
        if other.methods != first.methods or {n: p.shape for n, p in other.named_parameters()} != shapes:
            raise ValueError(
                f"A mean needs adapters of the same techniques and sizes: {first.name!r} and {other.name!r} differ. "
                "Changes of weights can be summed."
            )
    made = _copied(first)
    with torch.no_grad():
        for number, built in enumerate(made[2]):
            for at, delta in enumerate(built):
                theirs = [dict(member.deltas[number][at].named_parameters()) for member in members]
                for key, parameter in delta.named_parameters():
                    parameter.copy_(_weighted([own[key] for own in theirs], shares))
    return made


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = shares[0] * tensors[0].float()
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total = total + share * tensor.float()
    return total


def _factors(
    members: Sequence[Adapter], shares: Sequence[float], how: How, rank: int | None, density: float, seed: int
) -> tuple[dict[str, Factors], float]:
    """Of the combined change of each weight, and the share of it that the rank leaves out."""
    is_low_rank = all(delta.low_rank for member in members for _, _, delta in member.entries())
    if how == "sum" and rank is None and is_low_rank:
        return _joined(members, shares), 0.0
    if rank is None:
        raise ValueError(
            f"how={how!r} of these adapters has no low rank of its own. Say which rank its LoRA shall have: rank=16."
        )
    found = [changes(member) for member in members]
    if how == "ties":
        found = [largest(updates, density) for updates in found]
    names = dict.fromkeys(name for updates in found for name in updates)
    generator = torch.Generator().manual_seed(seed)
    combined = {}
    for name in names:
        present = [(updates[name], share) for updates, share in zip(found, shares, strict=True) if name in updates]
        combined[name] = merged([u for u, _ in present], [s for _, s in present], how, density, generator)
    return nearest(combined, rank)


def _joined(members: Sequence[Adapter], shares: Sequence[float]) -> dict[str, Factors]:
    """The sum of low-rank updates, exactly: their factors side by side."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for member, share in zip(members, shares, strict=True):
        for _, place, delta in member.entries():
            a, b, scale = delta.low_rank_factors()
            parts.setdefault(place.name, []).append((a.detach().float(), share * scale * b.detach().float()))
    joined = {
        name: (torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1), 1.0)
        for name, found in parts.items()
    }
    return {name: compact(factors) for name, factors in joined.items()}


def merged(
    updates: Sequence[Tensor], shares: Sequence[float], how: How, density: float, generator: torch.Generator
) -> Tensor:
    """One change of several, all of the same shape, each with its weight.

    Args:
        updates: the changes; for "ties" their `largest` numbers.
        shares: their weights.
        how: "sum", "ties" or "dare".
        density: the share of the numbers that "dare" keeps.
        generator: draws what "dare" keeps.
    """
    if how == "ties":
        kept = [share * update for update, share in zip(updates, shares, strict=True)]
        elected = torch.sign(torch.stack(kept).sum(0))
        agreeing = [torch.where(torch.sign(update) == elected, update, 0.0) for update in kept]
        sizes = [abs(share) * (update != 0) for update, share in zip(agreeing, shares, strict=True)]
        return torch.stack(agreeing).sum(0) / torch.stack(sizes).sum(0).clamp_min(1e-12)
    if how == "dare":
        masks = [torch.rand(update.shape, generator=generator).to(update.device) < density for update in updates]
        updates = [update * mask / density for update, mask in zip(updates, masks, strict=True)]
    return _weighted(updates, shares)


def largest(updates: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """This share of the numbers of all updates together, the largest by magnitude; the others 0 (section 4.1, trim).

    Args:
        updates: of one adapter, by their names.
        density: the share, above 0 and at most 1.
    """
    if not updates:
        return {}
    whole = torch.cat([update.flatten() for update in updates.values()])
    chosen = whole.abs().topk(max(1, round(density * len(whole)))).indices
    kept = torch.zeros_like(whole).index_copy(0, chosen, whole[chosen])
    parts = kept.split([update.numel() for update in updates.values()])
    return {name: part.view_as(update) for (name, update), part in zip(updates.items(), parts, strict=True)}


def _as_lora(model: PreTrainedModel, found: Mapping[str, Factors]) -> Made:
    """LoRA with these factors, one technique for each rank that there is."""
    by_rank: dict[int, list[str]] = {}
    for name, (a, _, _) in found.items():
        by_rank.setdefault(a.shape[0], []).append(name)
    made: Made = [], [], []
    for rank, names in by_rank.items():
        made[0].append(LoRA(rank=rank, alpha=float(rank)))
        made[1].append([exact(model, name, None, "output") for name in names])
        made[2].append([_delta(*found[name]) for name in names])
    return made


def _delta(a: Tensor, b: Tensor, scale: float) -> LowRankDelta:
    delta = LowRankDelta(a.shape[1], b.shape[0], rank=a.shape[0], scale=1.0).to(a.device)
    with torch.no_grad():
        delta.a.copy_(a)
        delta.b.copy_(scale * b)
    return delta


def _own(members: Sequence[Adapter], shares: Sequence[float], how: How, density: float, seed: int) -> dict[str, Tensor]:
    """The model's own parameters that the members train, combined as differences from the base model's."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(members[0].own_names)
    trained = [dict(member.named_parameters()) for member in members]
    values = [{name: own[name].detach().float() for name in names} for own in trained]
    if len(members) == 1 and shares == [1.0]:
        return values[0]
    if how == "mean":
        return {name: _weighted([own[name] for own in values], shares) for name in names}
    base = {name: members[0].base_parameters()[name].detach().float() for name in names}
    found = [{name: own[name] - base[name] for name in names} for own in values]
    if how == "ties":
        found = [largest(updates, density) for updates in found]
    return {
        name: base[name] + merged([updates[name] for updates in found], shares, how, density, generator)
        for name in names
    }
