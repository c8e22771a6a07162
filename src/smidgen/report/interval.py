"""The small pictures of a table's row: a technique's marker, and its interval on a scale that all rows share."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from smidgen.report.entries import Entry
from smidgen.report.numbers import Metric
from smidgen.report.scales import Scale, span
from smidgen.report.svg import add, add_marker, drawing, markup

WIDTH, HEIGHT = 104, 24


def swatch(entry: Entry) -> Markup:
    """The technique's marker in its colour, beside its name."""
    svg = drawing(14, 14, css=f"swatch {entry.colour}", label=None)
    add_marker(svg, entry.shape, 7, 7, 5)
    return markup(svg)


def intervals(entries: Sequence[Entry], metric: Metric) -> dict[str, Markup]:
    """For each technique with a score, by its id: interval, a dot for each of several seeds, the baseline's line."""
    scored = [entry for entry in entries if entry.technique.done and entry.technique.score is not None]
    if not scored:
        return {}
    ends = [end for entry in scored for end in _values(entry)]
    scale = Scale(*span(ends, least=0.02), 8, WIDTH - 8)
    baseline = next((entry.technique.score for entry in scored if entry.is_baseline), None)
    return {entry.id: _interval(entry, scale, baseline) for entry in scored}


def _values(entry: Entry) -> list[float]:
    row = entry.technique
    return [value for value in (row.score, row.low, row.high, *row.scores) if value is not None]


def _interval(entry: Entry, scale: Scale, baseline: float | None) -> Markup:
    svg, row, middle = drawing(WIDTH, HEIGHT, css=f"interval {entry.colour}", label=None), entry.technique, HEIGHT / 2
    add(svg, "line", {"class": "grid", "x1": 0, "x2": WIDTH, "y1": middle, "y2": middle})
    if baseline is not None:
        add(svg, "line", {"class": "baseline", "x1": scale(baseline), "x2": scale(baseline), "y1": 0, "y2": HEIGHT})
    if row.low is not None and row.high is not None:
        ends = {"x1": scale(row.low), "x2": scale(row.high)}
        add(svg, "line", {"class": "whisker", **ends, "y1": middle, "y2": middle})
    for score in row.scores if len(row.scores) > 1 else ():
        add(svg, "circle", {"class": "seed", "cx": scale(score), "cy": HEIGHT - 3, "r": 1.75})
    if row.score is not None:
        add_marker(svg, entry.shape, scale(row.score), middle, 4.5)
    return markup(svg)
