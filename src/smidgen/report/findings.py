"""A page of findings about a recipe: of each the answer in words, its chart and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from smidgen.process.finding import Chart, Finding, Line
from smidgen.process.recipe import Recipe
from smidgen.report import numbers
from smidgen.report.chart import FORMATS, Axis, Format, framed, group_of
from smidgen.report.entries import Entry, entries_of
from smidgen.report.labels import Box, shorten, text_width
from smidgen.report.lines import Drawn, draw, room_for
from smidgen.report.page import render_page
from smidgen.report.results import Comparison, Technique
from smidgen.report.scales import Scale, span, ticks
from smidgen.report.svg import add, add_marker, drawing, markup

LONGEST_NUMBER = 30
"""Characters of a table's cell that is a number, or a word or two beside one."""

ROW_HEIGHT = 26.0
"""Of a chart of intervals."""


def write_findings(
    found: Mapping[str, tuple[Finding, Mapping[str, Any]]], recipe: Recipe, path: Path, *, what: str
) -> None:
    """Write the page of what was found about a recipe to `path`, atomically.

    Args:
        found: by name, what was found and what it is about.
        recipe: the last one.
        path: the HTML file.
        what: the question that it answers.

    Raises:
        UserError: the disk is full.
    """
    sections = [
        {
            "id": name,
            "finding": finding,
            "about": about,
            "chart": draw_chart(finding.chart),
            "kinds": [_kind(cells) for cells in zip(*finding.table, strict=True)],
        }
        for name, (finding, about) in found.items()
    ]
    render_page("findings.html", path, sections=sections, recipe=recipe, what=what)


def _kind(cells: Sequence[str]) -> str:
    """How a column is set: as words, where a cell has so many that they want lines of their own."""
    return "words" if max(map(len, cells)) > LONGEST_NUMBER else "number"


def draw_chart(chart: Chart | None) -> Markup:
    """A chart for each width; empty if there is nothing to draw."""
    lines = [line for line in chart.lines if line.points] if chart is not None else []
    if chart is None or not lines:
        return Markup("")
    techniques = tuple(Technique(name=line.name, title=line.label) for line in lines)
    entries = entries_of(Comparison(techniques=techniques, baseline=chart.baseline))
    kind = _lines if chart.kind == "lines" else _intervals
    return Markup("").join(kind(chart, list(zip(entries, lines, strict=True)), layout) for layout in FORMATS)


def _lines(chart: Chart, lines: Sequence[tuple[Entry, Line]], layout: Format) -> Markup:
    plot = room_for([entry for entry, _ in lines], layout)
    ats = sorted({point.at for _, line in lines for point in line.points})
    low, high = ats[0], ats[-1]
    if low == high:
        low, high = (low / 2, 2 * low) if chart.is_logarithmic else (low - 1, low + 1)
    x = Scale(low, high, plot.left, plot.right, logarithmic=chart.is_logarithmic)
    y = Scale(*span(_values(lines), least=chart.shortest), plot.bottom, plot.top)
    svg = framed(
        layout,
        plot,
        Axis(x, _apart([(at, f"{at:.3g}" if at % 1 else numbers.count(at)) for at in ats], x, layout), chart.across),
        Axis(y, [(value, _tick(value)) for value in ticks(y.low, y.high, 6)], chart.up),
        f"{chart.title}. {'; '.join(_told(line) for _, line in lines)}.",
    )
    drawn = [
        Drawn(
            entry,
            [(x(point.at), y(point.value)) for point in line.points],
            _told(line),
            [None if p.low is None or p.high is None else (y(p.low), y(p.high)) for p in line.points],
        )
        for entry, line in lines
    ]
    draw(svg, layout, plot, drawn)
    return markup(svg)


def _apart(labels: Sequence[tuple[float, str]], x: Scale, layout: Format) -> list[tuple[float, str]]:
    """The labels of an axis that do not touch the one before; the last one always stands."""
    kept: list[tuple[float, str]] = []
    for at, text in reversed(labels):
        width = text_width(text, layout.font) + 10
        if not kept or x(kept[-1][0]) - x(at) >= (width + text_width(kept[-1][1], layout.font)) / 2:
            kept.append((at, text))
    return kept[::-1]


def _intervals(chart: Chart, lines: Sequence[tuple[Entry, Line]], layout: Format) -> Markup:
    """A row for each: its label on the left, its interval over a common axis."""
    left = max(text_width(shorten(entry.label, layout.letters), layout.font) for entry, _ in lines) + 20
    height = 50 + ROW_HEIGHT * len(lines)
    plot = Box(left, 8, layout.width - 16, height - 42)
    x = Scale(*span([*_values(lines), *chart.marks], least=0.02), plot.left, plot.right)
    told = f"{chart.title}. {'; '.join(_told(line) for _, line in lines)}."
    svg = drawing(layout.width, height, css=layout.css, label=told)
    axes = add(svg, "g", {"class": "axes"})
    if len(chart.marks) > 2:  # a margin, and what lies in its middle
        low, high = x(chart.marks[0]), x(chart.marks[-1])
        add(
            axes,
            "rect",
            {"class": "band", "x": low, "y": plot.top, "width": high - low, "height": plot.bottom - plot.top},
        )
    add(axes, "line", {"class": "axis", "x1": plot.left, "x2": plot.right, "y1": plot.bottom, "y2": plot.bottom})
    for value in ticks(x.low, x.high, layout.steps):
        add(axes, "text", {"class": "middle", "x": x(value), "y": plot.bottom + 17}, _tick(value))
    add(axes, "text", {"class": "title end", "x": plot.right, "y": height - 6}, chart.across)
    for mark in chart.marks[len(chart.marks) // 2 :][:1]:
        add(svg, "line", {"class": "baseline", "x1": x(mark), "x2": x(mark), "y1": plot.top, "y2": plot.bottom})
    for row, (entry, line) in enumerate(lines):
        middle, point = plot.top + (row + 0.5) * ROW_HEIGHT, line.points[0]
        group = group_of(svg, entry, _told(line))
        add(
            group, "text", {"class": "label end", "x": left - 12, "y": middle + 4}, shorten(entry.label, layout.letters)
        )
        if point.low is not None and point.high is not None:
            ends = {"x1": x(point.low), "x2": x(point.high)}
            add(group, "line", {"class": "whisker", **ends, "y1": middle, "y2": middle})
        add_marker(group, entry.shape, x(point.value), middle, 5)
    return markup(svg)


def _tick(value: float) -> str:
    return f"{round(value, 6):g}".replace("-", numbers.MINUS)


def _values(lines: Sequence[tuple[Entry, Line]]) -> list[float]:
    points = [point for _, line in lines for point in line.points]
    return [value for point in points for value in (point.value, point.low, point.high) if value is not None]


def _told(line: Line) -> str:
    last = line.points[-1]
    return f"{line.label}: {numbers.short(last.value)}"
