"""What is wrong with a recipe, in words that let a user mend it: the field, its value, and what would do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from smidgen.errors import UserError

Path = tuple[str | int, ...]

LONGEST_VALUE = 60
"""Characters of a value that a message shows."""

WANTED = {  # pydantic's kind of error: what would do
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping, such as {name: value}",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a section with fields of its own",
}


class Problem(NamedTuple):
    """One mistake; `path` leads from the recipe to the field."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}{self.message}"


class Problems(ValueError):
    """The mistakes inside one field of a pydantic model; their paths start at that field."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


def dotted(path: Path) -> str:
    """A path as a user writes it: training.epochs, compare.0.rank."""
    return ".".join(map(str, path))


def shown(value: object) -> str:
    """A value in a message, on one line and not too long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # null and true, as in YAML
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def wrong(path: Path, value: object, message: str) -> Problem:
    """The mistake of a field that has a wrong value: `training.epochs=0 must be at least 1`."""
    return Problem(path, f"={shown(value)} {message}")


NAMED = 20
"""Names in a message at most."""


def unknown(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them, if they are few, or some."""
    names = [str(candidate) for candidate in known]
    near = get_close_matches(name, names, n=1) or [n for n in names if n.casefold() == name.casefold()]
    nearest = f" Did you mean {near[0]!r}?" if near else ""
    if near and len(names) > NAMED:
        return nearest
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{nearest} Known: {', '.join(names[:NAMED])}{more}."


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every mistake that pydantic found in `model`, in a user's words."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path, value = detail["loc"], detail["input"]
        cause = detail.get("ctx", {}).get("error")
        if (
            detail["type"] == "default_factory_not_called"
        ):  # it would have used a field that is wrong, and is named itself
            continue
        if isinstance(cause, Problems):
            problems += [Problem((*path, *inner.path), inner.message) for inner in cause.problems]
        elif detail["type"] == "extra_forbidden":
            problems.append(Problem(path, f" is no field of a recipe.{_nearest_field(path, model)}"))
        elif detail["type"] == "missing":
            problems.append(Problem(path, " is not given and has no default."))
        elif cause is not None:
            whole = Problem(path, f": {cause}" if path else str(cause))
            problems.append(whole if isinstance(value, dict) else wrong(path, value, str(cause)))
        else:
            problems.append(wrong(path, value, requirement(detail["msg"], detail["type"], value)))
    return problems


def requirement(message: str, kind: str, value: object) -> str:
    """What pydantic says about a value ("Input should be a valid integer"), as the end of ours."""
    if kind in WANTED:
        return f"must be {WANTED[kind]}."
    if kind == "string_type":
        return "must be text." if value is None else "must be text: write it in quotes."
    return message.replace("Input should", "must").replace("be greater than or equal to", "be at least") + "."


def refuse(source: str, problems: Iterable[Problem]) -> UserError:
    """One error for all the mistakes in `source`, one line each."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return UserError(f"{source}: {lines[0]}")
    return UserError("\n  ".join([f"{source} has {len(lines)} mistakes:", *lines]))


def _nearest_field(path: Path, model: type[BaseModel]) -> str:
    """Where the user may have meant: the nearest name in this section, or in any."""
    fields = list(_fields(model))
    here = {field[-1]: dotted(field) for field in fields if field[:-1] == path[:-1]}
    anywhere = {field[-1]: dotted(field) for field in fields}
    for known in (here, anywhere):
        for name in get_close_matches(str(path[-1]), known, n=1):
            return f" Did you mean {known[name]}?"
    return f" Known: {', '.join(here)}."


def _fields(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _fields(section, (*above, name))
