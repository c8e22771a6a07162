"""What a search may choose of each technique: its learning rate, and the sizes that the budget allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from smidgen.errors import UserError
from smidgen.process.data import TaskData
from smidgen.process.models import kind, load_model
from smidgen.process.opening import attach_technique
from smidgen.process.recipe import Recipe
from smidgen.process.technique import Part, TechniqueSpec

SIZES = ("rank", "size", "reduction", "length")
"""Options that say how large an adapter is: a half, twice and four times their defaults are tried."""

RATES = (1 / 4, 4)
"""The learning rates that are tried, as multiples of the technique's default."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may be chosen of a technique.

    Attributes:
        spec: the entry of the recipe.
        rate: its default learning rate; None if the entry gives one.
        sizes: the size option's values that the budget allows, by the parameters that each trains.
        option: the name of that option; None if there is none, or the entry gives it.
    """

    spec: TechniqueSpec
    rate: float | None
    sizes: Mapping[int, int]
    option: str | None

    def entry(self, rate: float | None, size: int | None) -> TechniqueSpec:
        """The technique with this learning rate and this size, and its scale."""
        first = self.spec.parts[0]
        sized: dict[str, Any] = {}
        if size is not None and self.option is not None:
            own = size == default_size(first, self.option)
            sized = {self.option: size} if own else first.method().resized(self.option, size)
        options = {**first.options, **sized}
        part = dataclasses.replace(first, options=options, learning_rate=rate or first.learning_rate)
        return dataclasses.replace(self.spec, parts=(part, *self.spec.parts[1:]))


def candidates(recipe: Recipe, data: TaskData) -> dict[str, Candidate]:
    """What may be chosen, by the entries' slugs: all that trains no more parameters than the budget allows.

    Raises:
        UserError: a technique does not go with the model, or nothing meets the budget; the smallest is named.
    """
    found: dict[str, Candidate] = {}
    counts: dict[str, int] = {}
    most = recipe.choose.trained or math.inf
    for spec in recipe.compare:
        model, tokenizer = load_model(
            recipe.model, recipe.task, data.labels, seed=0, precision=recipe.training.precision
        )
        default = spec.methods()[0].learning_rates[kind(model)]
        option = _size_option(spec.parts[0])
        sizes: dict[int, int] = {}
        for value in _values(spec.parts[0], option):
            candidate = Candidate(spec, None, {}, option)
            try:
                adapter = attach_technique(candidate.entry(None, value or None), model, tokenizer)
            except UserError:
                if value == default_size(spec.parts[0], option):
                    raise
                continue  # a size that the model has no room for
            counts[f"{spec.slug} {value}"] = adapter.trainable
            if adapter.trainable <= most:
                sizes[value] = adapter.trainable
            if option is not None:
                adapter.detach()
        if sizes:
            has_rate = spec.parts[0].learning_rate is not None or recipe.training.learning_rate is not None
            found[spec.slug] = Candidate(spec, None if has_rate else default, sizes, option)
    if not found:
        name, count = min(counts.items(), key=lambda item: item[1])
        slug, _, size = name.partition(" ")
        named = next(spec for spec in recipe.compare if spec.slug == slug)
        option = _size_option(named.parts[0])
        raise UserError(
            f"choose.trained={recipe.choose.trained} is met by nothing in compare. The smallest is {slug}"
            f"{f' with {option} {size}' if option else ''}, which trains {count:,} parameters, the head among them."
        )
    return found


def _size_option(part: Part) -> str | None:
    method = part.method()
    known = {field.name for field in dataclasses.fields(method)} - set(part.options)
    return next((name for name in SIZES if name in known and isinstance(getattr(method, name), int)), None)


def default_size(part: Part, option: str | None) -> int:
    """The value of a size option unless it is searched for; 0 if there is none."""
    return 0 if option is None else int(getattr(part.method(), option))


def _values(part: Part, option: str | None) -> list[int]:
    """The sizes to try; 0 stands for what has none."""
    given = default_size(part, option)
    if option is None:
        return [0]
    return sorted({size for size in (given // 2, given, 2 * given, 4 * given) if size > 0})
