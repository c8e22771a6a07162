"""What a study found: an answer in words, a table and a chart, as a page shows it and JSON holds it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from smidgen import __version__, files
from smidgen.errors import UserError
from smidgen.process.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Point:
    """A place of a chart; `low` and `high` are the ends of its interval, if it has one."""

    at: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """The points of one technique, or of one way to use it.

    Attributes:
        name: the technique's key, by which it has its colour.
        label: its name for people.
        points: in the order of the axis; in a chart of intervals a single one.
    """

    name: str
    label: str
    points: Sequence[Point]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over an axis, or a line of its own for each interval.

    Attributes:
        kind: "lines", or "intervals".
        title: what it shows.
        across: what the horizontal axis is.
        up: what the vertical axis is; of intervals nothing.
        lines: what is drawn.
        is_logarithmic: whether equal distances across are equal ratios.
        marks: values to draw a line at, such as the ends of a margin.
        shortest: the least that the vertical axis spans, so that a small difference does not look like a mountain.
        baseline: the name of the line that the others are measured against, if there is one.
    """

    kind: Literal["lines", "intervals"]
    title: str
    across: str
    up: str
    lines: Sequence[Line]
    is_logarithmic: bool = False
    marks: Sequence[float] = ()
    shortest: float = 0.02
    baseline: str | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a study found.

    Attributes:
        title: the promise.
        answer: in words, with numbers.
        headings: of the table; the first column names the row.
        table: its cells as people read them.
        chart: None if there is nothing to draw.
        notes: what one should know about the numbers, in sentences.
        rows: the same and more as numbers, for a program.
    """

    title: str
    answer: str
    headings: Sequence[str]
    table: Sequence[Sequence[str]]
    chart: Chart | None
    notes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


def write(found: Finding, about: Mapping[str, Any], path: Path) -> None:
    """Write a finding, and what it is about, as JSON, atomically."""
    files.write_json(path, {**about, **dataclasses.asdict(found)})


def about(recipe: Recipe, command: str, failures: Mapping[str, str]) -> dict[str, Any]:
    """What a finding is about: when and how it was made, and what went wrong."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "smidgen": __version__,
        "command": command,
        "recipe": recipe.written(),
        "failures": dict(failures),
    }


def read(path: Path) -> tuple[Finding, dict[str, Any]]:
    """The finding that `write` wrote, and what it is about.

    Raises:
        UserError: the file is something else.
    """
    values = files.read_json(path)
    try:
        known = {field.name: values.pop(field.name) for field in dataclasses.fields(Finding)}
        chart = known["chart"]
        if chart is not None:
            lines = [
                Line(**{**line, "points": [Point(**point) for point in line["points"]]}) for line in chart["lines"]
            ]
            known["chart"] = Chart(**{**chart, "lines": lines})
        return Finding(**known), values
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what a study wrote. Remove it, and run the study again.") from error
