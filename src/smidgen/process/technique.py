"""A technique in a recipe: `lora`, `{name: lora, rank: 16}`, or a list of those that are trained as one adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from smidgen.process.problems import Problem, Problems, requirement, unknown, wrong

if TYPE_CHECKING:
    from smidgen.delta import Method

RATES = ("learning_rate", "head_learning_rate")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


@dataclasses.dataclass(frozen=True)
class Part:
    """One technique, the options given for it and its learning rate; what is not given stays at its defaults."""

    name: str
    options: Mapping[str, Any]
    learning_rate: float | None = None

    def method(self) -> Method:
        """The technique as `attach` takes it."""
        from smidgen.methods import METHODS

        return METHODS[self.name](**self.options)

    def anchored(self, folder: Path) -> Part:
        """With the paths among its options taken from this folder."""
        method = self.method().anchored(folder)
        return dataclasses.replace(self, options={option: getattr(method, option) for option in self.options})

    def written(self) -> dict[str, Any]:
        """What a recipe says of it."""
        rate = {"learning_rate": self.learning_rate} if self.learning_rate is not None else {}
        return {"name": self.name, **self.options, **rate}


@dataclasses.dataclass(frozen=True)
class TechniqueSpec:
    """One adapter of a recipe: a technique, or several that are trained together.

    Args:
        parts: the techniques in the order in which they are attached; one, except for hybrids.
        head_learning_rate: of the task's head; None: the first technique's own default.
    """

    parts: tuple[Part, ...]
    head_learning_rate: float | None = None

    @classmethod
    def parse(cls, value: object) -> TechniqueSpec:
        """Reads an entry of a recipe.

        Raises:
            Problems: every mistake in it: an unknown technique or option, an option's wrong type or value.
        """
        if isinstance(value, TechniqueSpec):
            return value
        entries = [((index,), entry) for index, entry in enumerate(value)] if isinstance(value, list) else [((), value)]
        if not entries:
            raise Problems([wrong((), value, "holds no technique.")])
        parts: list[Part] = []
        head_rate: float | None = None
        problems: list[Problem] = []
        for path, entry in entries:
            try:
                part, own_head_rate = _part(entry)
            except Problems as error:
                problems += [Problem((*path, *inner.path), inner.message) for inner in error.problems]
                continue
            parts.append(part)
            if None not in (head_rate, own_head_rate) and own_head_rate != head_rate:
                where = (*path, "head_learning_rate")
                problems.append(wrong(where, own_head_rate, f"differs from {head_rate}: one adapter has one head."))
            head_rate = own_head_rate if head_rate is None else head_rate
        if problems:
            raise Problems(problems)
        return cls(tuple(parts), head_rate)

    @property
    def name(self) -> str:
        """The technique's key in METHODS; of a hybrid, the keys joined by +."""
        return "+".join(part.name for part in self.parts)

    @property
    def slug(self) -> str:
        """A name for a folder that tells this entry from others of the same technique: lora, lora-rank-16."""
        slug = "_".join("-".join([part.name, *(f"{k}-{v}" for k, v in _changed(part).items())]) for part in self.parts)
        slug += f"-head_learning_rate-{self.head_learning_rate}" if self.head_learning_rate is not None else ""
        if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", slug):
            return slug
        names = "_".join(dict.fromkeys(part.name for part in self.parts))
        return f"{names[:50]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"

    def methods(self) -> list[Method]:
        """The techniques as `attach` takes them."""
        return [part.method() for part in self.parts]

    def anchored(self, folder: Path) -> TechniqueSpec:
        """With the paths among its options taken from this folder."""
        return dataclasses.replace(self, parts=tuple(part.anchored(folder) for part in self.parts))

    def written(self) -> Any:
        """The entry that `parse` reads back as this."""
        entries = [part.written() for part in self.parts]
        if self.head_learning_rate is not None:
            entries[0]["head_learning_rate"] = self.head_learning_rate
        short = [entry["name"] if len(entry) == 1 else entry for entry in entries]
        return short if len(short) > 1 else short[0]

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the adapter, defaults included, as JSON can hold it."""
        methods = [
            part.written() | dataclasses.asdict(method) | method.contents()
            for part in self.parts
            for method in [part.method()]
        ]
        return {"methods": methods, "head_learning_rate": self.head_learning_rate}


def _part(entry: object) -> tuple[Part, float | None]:
    """The technique of an entry, and the head's rate that it gives."""
    from smidgen.methods import METHODS

    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or "name" not in given:
        raise Problems([wrong((), entry, "must be a technique's name, or a mapping with `name` and its options.")])
    options = {name: value for name, value in given.items() if name != "name"}
    path = () if isinstance(entry, str) else ("name",)
    name = given["name"]
    if not isinstance(name, str) or name not in METHODS:
        raise Problems([wrong(path, name, f"is no technique.{unknown(str(name), METHODS)}")])
    method = METHODS[name]
    hints = get_type_hints(method)
    types = {field.name: hints[field.name] for field in dataclasses.fields(method)}
    problems = [
        Problem((option,), f" is no option of {name}.{unknown(option, types)}")
        for option in options
        if option not in types and option not in RATES
    ]
    values: dict[str, Any] = {}
    for option, hint in {**types, **dict.fromkeys(RATES, Rate)}.items():
        if option in options:
            try:
                values[option] = _checked(options[option], hint)
            except ValidationError as error:
                wants = dict.fromkeys(requirement(e["msg"], e["type"], options[option]) for e in error.errors())
                problems.append(wrong((option,), options[option], " or ".join(w.rstrip(".") for w in wants) + "."))
    if problems:
        raise Problems(problems)
    rates = {rate: values.pop(rate) for rate in RATES if rate in values}
    try:
        method(**values)
    except ValueError as error:
        raise Problems([Problem((), f": {error}")]) from error
    return Part(name, values, rates.get("learning_rate")), rates.get("head_learning_rate")


def _checked(value: Any, hint: Any) -> Any:
    """The value as the hint's type: an integer may stand for a float, a list for a tuple, and nothing else changes."""
    return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_json(json.dumps(value))


def _changed(part: Part) -> dict[str, Any]:
    """The options that differ from the technique's defaults, in the technique's order, and its rate."""
    defaults = {field.name: field.default for field in dataclasses.fields(part.method())}
    given = {name: part.options[name] for name in defaults if part.options.get(name, defaults[name]) != defaults[name]}
    return given | ({"learning_rate": part.learning_rate} if part.learning_rate is not None else {})
