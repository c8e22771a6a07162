"""Lines of a chart: each with its points, its marker and its label at the right end."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from smidgen.report.chart import Format, group_of
from smidgen.report.entries import Entry
from smidgen.report.labels import Box, shorten, spread, text_width
from smidgen.report.svg import add, add_marker, number

MANY_POINTS = 12
"""Above this the points of a line are not marked one by one."""


@dataclass(frozen=True)
class Drawn:
    """A line in pixels.

    Attributes:
        entry: whose it is.
        points: (x, y), from left to right.
        ends: the ends of each point's interval, where it has one.
        told: what is shown where the pointer rests on it.
    """

    entry: Entry
    points: Sequence[tuple[float, float]]
    told: str
    ends: Sequence[tuple[float, float] | None] = ()


def room_for(entries: Sequence[Entry], layout: Format) -> Box:
    """The area of the marks when the entries' labels stand right of it."""
    longest = max(text_width(shorten(entry.label, layout.letters), layout.font) for entry in entries)
    return layout.plot(right=longest + 26)


def draw(svg: ET.Element, layout: Format, plot: Box, lines: Sequence[Drawn]) -> None:
    """Draw the lines, and their labels so that none covers another."""
    rows = spread([line.points[-1][1] for line in lines], layout.font + 3, plot.top, plot.bottom)
    for line, row in zip(lines, rows, strict=True):
        group = group_of(svg, line.entry, line.told)
        points = [f"{number(at)} {number(height)}" for at, height in line.points]
        leader = f"M{points[-1]}H{number(plot.right + 6)}L{number(plot.right + 18)} {number(row)}"
        add(group, "path", {"class": "leader", "d": leader})
        for (at, _), ends in zip(line.points, line.ends, strict=False):
            if ends is not None:
                add(group, "line", {"class": "whisker", "x1": at, "x2": at, "y1": ends[0], "y2": ends[1]})
        add(group, "path", {"class": "line", "d": "M" + "L".join(points)})
        if len(points) <= MANY_POINTS:
            add(group, "path", {"class": "dots", "d": "".join(f"M{point}h0" for point in points[:-1])})
        add_marker(group, line.entry.shape, *line.points[-1], 4.5)
        text = shorten(line.entry.label, layout.letters)
        add(group, "text", {"class": "label", "x": plot.right + 22, "y": row + 4}, text)
