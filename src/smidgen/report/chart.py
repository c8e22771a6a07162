"""What the charts of the page share: their sizes, their axes, and a group for each technique.

They are inline SVG drawn here, not by a plotting library: plotly.js alone would add 4 MB to every page, needs
JavaScript, and neither prints nor follows a dark theme by itself. Each of these is a few kB, takes its colours from
style.css, and is drawn for two widths, of which the page shows the one that fits, so that its text stays readable.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from smidgen.report.entries import Entry
from smidgen.report.labels import Box
from smidgen.report.scales import Scale
from smidgen.report.svg import add, drawing


@dataclass(frozen=True)
class Format:
    """A size to draw for.

    Args:
        css: the class by which style.css shows the chart only where it fits.
        width: pixels; the text has its own size at this width.
        height: pixels.
        font: size of the text in pixels, as in style.css.
        letters: where a technique's label is cut.
        steps: about how many ticks fit below the x axis.
    """

    css: str
    width: float
    height: float
    font: float
    letters: int
    steps: int

    def plot(self, *, right: float) -> Box:
        """The area of the marks: what the axes and `right` pixels leave free."""
        return Box(44, 34, self.width - right, self.height - 46)


WIDE = Format("chart wide", 900, 430, 13, 28, 8)
NARROW = Format("chart narrow", 340, 440, 12, 17, 5)
FORMATS = (WIDE, NARROW)


@dataclass(frozen=True)
class Axis:
    """A scale, the values that are written along it, and what they are."""

    scale: Scale
    ticks: Sequence[tuple[float, str]]
    title: str


def framed(layout: Format, plot: Box, x: Axis, y: Axis, label: str) -> ET.Element:
    """A drawing with both axes: light lines across for y, small ticks for x, titles that read from left to right."""
    svg = drawing(layout.width, layout.height, css=layout.css, label=label)
    axes = add(svg, "g", {"class": "axes"})
    add(axes, "text", {"class": "title", "x": 0, "y": 12}, y.title)
    add(axes, "text", {"class": "title end", "x": plot.right, "y": layout.height - 6}, x.title)
    for value, text in y.ticks:
        height = y.scale(value)
        add(axes, "line", {"class": "grid", "x1": plot.left, "x2": plot.right, "y1": height, "y2": height})
        add(axes, "text", {"class": "end", "x": plot.left - 8, "y": height + 4}, text)
    add(axes, "line", {"class": "axis", "x1": plot.left, "x2": plot.right, "y1": plot.bottom, "y2": plot.bottom})
    for value, text in x.ticks:
        across = x.scale(value)
        add(axes, "line", {"class": "axis", "x1": across, "x2": across, "y1": plot.bottom, "y2": plot.bottom + 5})
        add(axes, "text", {"class": "middle", "x": across, "y": plot.bottom + 19}, text)
    return svg


def group_of(svg: ET.Element, entry: Entry, told: str) -> ET.Element:
    """A group in the technique's colour; `told` is shown where the pointer rests on it."""
    group = add(svg, "g", {"class": f"technique {entry.colour}"})
    add(group, "title", {}, told)
    return group
