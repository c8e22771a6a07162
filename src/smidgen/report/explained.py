"""What an adapter has learned, as text for a terminal and as a picture that stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from smidgen.explaining import Explanation
from smidgen.report.svg import add, document

_WIDTH, _BAR, _ROW, _COLUMNS = 300.0, 120.0, 15.0, 3
_STYLE = (
    "text { font: 11px system-ui, sans-serif; fill: currentColor } .bar { fill: #2563eb } "
    ".less { fill-opacity: 0.45 } .place { font-weight: 600 }"
)


def as_text(explanations: Sequence[Explanation]) -> str:
    """A paragraph for each delta: where it is, what the numbers are, and a bar for each, grey for a negative one."""
    return "\n\n".join("\n".join(_lines(explanation)) for explanation in explanations)


def _lines(explanation: Explanation) -> list[str]:
    largest = _largest(explanation)
    width = max((len(name) for name, _ in explanation.values), default=0)
    bars = [
        f"  {name:<{width}}  {value:9.4f}  {('█' if value > 0 else '▒') * round(30 * abs(value) / largest)}"
        for name, value in explanation.values
    ]
    return [f"{explanation.place} ({explanation.technique}): {explanation.about}", *bars]


def _largest(explanation: Explanation) -> float:
    return max((abs(value) for _, value in explanation.values), default=1.0) or 1.0


def as_picture(explanations: Sequence[Explanation], title: str) -> str:
    """An SVG document: a panel for each delta, its bars to the scale of the panel's largest, pale if negative."""
    rows = [explanations[at : at + _COLUMNS] for at in range(0, len(explanations), _COLUMNS)]
    heights = [(max(len(panel.values) for panel in row) + 3) * _ROW for row in rows]
    total = 30 + sum(heights)
    svg = document(_COLUMNS * _WIDTH, total, title=title, style=_STYLE)
    add(svg, "text", {"x": 8, "y": 18, "class": "place"}, title)
    top = 30.0
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _draw(svg, panel, column * _WIDTH + 8, top)
        top += height
    return ET.tostring(svg, encoding="unicode") + "\n"


def _draw(svg: ET.Element, panel: Explanation, left: float, top: float) -> None:
    group = add(svg, "g", {})
    add(group, "title", {}, f"{panel.place}: {panel.about}")
    add(group, "text", {"x": left, "y": top + _ROW, "class": "place"}, _cut(panel.place, 44))
    add(
        group,
        "text",
        {"x": left, "y": top + 2 * _ROW},
        panel.about if len(panel.about) <= 54 else f"{panel.about[:53]}…",
    )
    largest = _largest(panel)
    for number, (name, value) in enumerate(panel.values, start=2):
        y = top + number * _ROW + 4
        add(group, "text", {"x": left, "y": y + 10}, _cut(name, 18))
        length = _BAR * abs(value) / largest
        kind = "bar" if value > 0 else "bar less"
        add(group, "rect", {"class": kind, "x": left + 110, "y": y + 2, "width": length, "height": _ROW - 5})
        add(group, "text", {"x": left + 115 + length, "y": y + 10}, f"{value:.3g}")


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"…{text[1 - letters :]}"
