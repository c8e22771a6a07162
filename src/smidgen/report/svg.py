"""Drawing SVG: elements, whose text and attributes the XML writer escapes, and the shapes that charts need."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from markupsafe import Markup

Attributes = Mapping[str, str | float]

_OUTLINES = (  # of about the area of a disc of radius 1
    ((-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)),
    ((0, -1.28), (1.28, 0), (0, 1.28), (-1.28, 0)),
    ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
    ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
)
SHAPES = 1 + len(_OUTLINES)

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def drawing(width: float, height: float, *, css: str, label: str | None) -> ET.Element:
    """An empty drawing in pixels, which scales with its box; without a label it is hidden from screen readers."""
    svg = ET.Element("svg", {"class": css, "viewBox": f"0 0 {number(width)} {number(height)}"})
    svg.attrib.update({"role": "img", "aria-label": label} if label else {"aria-hidden": "true"})
    return svg


def document(width: float, height: float, *, title: str, style: str) -> ET.Element:
    """An empty SVG document that stands alone, light or dark as its viewer is."""
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "style": "color-scheme: light dark; color: CanvasText; background: Canvas",
        },
    )
    add(svg, "title", {}, title)
    add(svg, "style", {}, style)
    return svg


def add(parent: ET.Element, tag: str, attributes: Attributes, text: str | None = None) -> ET.Element:
    """Add an element; numbers are rounded to a tenth of a pixel, and letters that XML forbids have a stand-in."""
    written = {key: value if isinstance(value, str) else number(value) for key, value in attributes.items()}
    element = ET.SubElement(parent, tag, written)
    element.text = None if text is None else _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
    return element


def add_marker(parent: ET.Element, shape: int, x: float, y: float, radius: float) -> None:
    """Add a marker with its middle at (x, y): for 0 a disc, else the outline of that number."""
    if shape == 0:
        add(parent, "circle", {"class": "mark", "cx": x, "cy": y, "r": radius})
        return
    corners = (f"{number(x + radius * dx)},{number(y + radius * dy)}" for dx, dy in _OUTLINES[shape - 1])
    add(parent, "polygon", {"class": "mark", "points": " ".join(corners)})


def number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def markup(svg: ET.Element) -> Markup:
    """The drawing as HTML."""
    return Markup(ET.tostring(svg, encoding="unicode"))
