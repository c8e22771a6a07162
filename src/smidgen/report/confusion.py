"""Which classes are taken for which: a drawn matrix for many classes, and the most frequent mistakes in words."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from smidgen.report.entries import Entry
from smidgen.report.labels import shorten, text_width
from smidgen.report.svg import add, drawing, markup

Matrix = Sequence[Sequence[int]]

FEW_CLASSES = 10  # up to here the matrix is a table of numbers
LETTERS = 32  # where a class's name is cut beside the drawn matrix


@dataclass(frozen=True)
class Mistake:
    """Rows of class `true` that were taken for `predicted`, and their share of all rows of that class."""

    true: str
    predicted: str
    count: int
    share: float


def mistakes(matrix: Matrix, labels: Sequence[str], *, most: int = 12) -> list[Mistake]:
    """The most frequent mistakes, the most frequent first."""
    found = [
        Mistake(name_of(labels, i), name_of(labels, j), value, value / sum(row))
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i != j and value > 0
    ]
    return sorted(found, key=lambda mistake: (-mistake.count, -mistake.share))[:most]


def cells(matrix: Matrix) -> list[tuple[int, int, int]]:
    """The cells that are not zero: true class, predicted class, count."""
    return [(i, j, value) for i, row in enumerate(matrix) for j, value in enumerate(row) if value > 0]


def level(value: int, row: Sequence[int]) -> int:
    """The shade of a cell by its share of its row: 0 for an empty one, then 1 to 5, finer for small shares."""
    if value <= 0:
        return 0
    share = value / sum(row)
    return 1 + sum(share >= bound for bound in (0.05, 0.15, 0.4, 0.7))


def name_of(labels: Sequence[str], index: int) -> str:
    """A class's name, or its number where the names are not known."""
    return labels[index] if index < len(labels) else f"class {index}"


def readable(entries: Sequence[Entry], labels: Sequence[str]) -> dict[str, Any]:
    """What the page's script needs to tell the cell under the pointer: the classes, and each technique's cells."""
    matrices = [entry.technique.confusion or () for entry in entries]
    classes = max(len(matrix) for matrix in matrices)
    return {
        "labels": [name_of(labels, index) for index in range(classes)],
        "cells": [cells(matrix) for matrix in matrices],
    }


def grid(entries: Sequence[Entry], labels: Sequence[str], chosen: int) -> Markup:
    """The matrix for many classes: one drawing, in which each technique's cells are a group of which one is shown.

    A cell is a square of `side` pixels; those of one shade are one path, which keeps a matrix of 77 classes near 5 kB.
    """
    matrices = [entry.technique.confusion or () for entry in entries]
    classes = max(len(matrix) for matrix in matrices)
    side = max(11, min(22, 800 // classes))
    font = min(12, side - 1)
    names = [shorten(name_of(labels, index), LETTERS) for index in range(classes)]
    margin = max(text_width(name, font) for name in names) + 12
    width = margin + classes * side + 1
    svg = drawing(
        width, width, css="grid", label=f"Confusion matrix of {classes} classes; the tables below tell it in words."
    )
    svg.attrib.update({"width": f"{width:.0f}", "height": f"{width:.0f}", "style": f"font-size:{font}px"})
    svg.attrib.update({"data-margin": f"{margin:.1f}", "data-side": f"{side}"})
    _frame(svg, names, margin, side)
    for index, matrix in enumerate(matrices):
        place = {
            "data-panel": f"classes-{index}",
            "transform": f"translate({margin:.1f} {margin + side / 2:.1f}) scale({side})",
        }
        group = add(svg, "g", place | ({} if index == chosen else {"class": "other"}))
        for css, path in _paths(matrix).items():
            add(group, "path", {"class": css, "d": path})
    return markup(svg)


def _frame(svg: ET.Element, names: Sequence[str], margin: float, side: int) -> None:
    end = margin + len(names) * side
    add(svg, "text", {"class": "title", "x": 0, "y": margin - 8}, "true ↓  predicted →")
    for index, name in enumerate(names):
        at = margin + index * side
        if index % 2:
            add(svg, "rect", {"class": "stripe", "x": 0, "y": at, "width": end, "height": side})
        add(svg, "text", {"class": "end", "x": margin - 6, "y": at + side * 0.78}, name)
        x, y = at + side * 0.78, margin - 6
        add(svg, "text", {"transform": f"translate({x:.1f} {y:.1f}) rotate(-90)"}, name)
    size = len(names) * side
    add(svg, "rect", {"class": "edge", "x": margin, "y": margin, "width": size, "height": size})


def _paths(matrix: Matrix) -> dict[str, str]:
    """A path for each shade of right answers and of mistakes: strokes that are one cell long and one wide."""
    paths: dict[str, str] = {}
    for i, j, value in cells(matrix):
        css = f"{'right' if i == j else 'wrong'} l{level(value, matrix[i])}"
        paths[css] = paths.get(css, "") + f"M{j} {i}h1"
    return paths
