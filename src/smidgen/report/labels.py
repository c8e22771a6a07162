"""Where the labels of a chart go, so that they do not cover each other or the marks."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LETTER = 0.56  # the mean width of a letter of a sans-serif, in font sizes


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def holds(self, other: Box) -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


class Line(NamedTuple):
    """A line in pixels."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def length(self) -> float:
        """Pixels."""
        return math.hypot(self.x2 - self.x1, self.y2 - self.y1)


@dataclass(frozen=True)
class Anchor:
    """A point to be labelled, and the size of its label, in pixels."""

    x: float
    y: float
    width: float
    height: float


def text_width(text: str, font_size: float) -> float:
    """About how wide a text will be, in pixels."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)  # as Chinese letters are
    return font_size * (LETTER * (len(text) - wide) + wide)


def shorten(text: str, letters: int) -> str:
    """The text, cut to so many letters with an ellipsis."""
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


def place(anchors: Sequence[Anchor], obstacles: Sequence[tuple[Box, float]], bounds: Box) -> list[Box]:
    """A box for each label, near its anchor: the most crowded are placed first, each where it covers least.

    Args:
        anchors: the points, with their labels' sizes.
        obstacles: what should stay free, and how much a covered pixel of it counts.
        bounds: the labels stay within.

    Returns:
        A box for each anchor, in their order.
    """

    def crowding(index: int) -> float:
        anchor = anchors[index]
        return sum(1 / (20 + math.hypot(anchor.x - other.x, anchor.y - other.y)) for other in anchors)

    placed: dict[int, Box] = {}
    for index in sorted(range(len(anchors)), key=crowding, reverse=True):
        around = _Surroundings(
            covered=[*obstacles, *((box, 8.0) for box in placed.values())],
            leaders=[leader(anchors[other], box) for other, box in placed.items()],
            anchors=[anchor for other, anchor in enumerate(anchors) if other != index],
        )
        placed[index] = around.best(anchors[index], bounds)
    return [placed[index] for index in range(len(anchors))]


@dataclass(frozen=True)
class _Surroundings:
    """What a label meets: boxes to keep free and their weights, leaders of other labels, other points."""

    covered: Sequence[tuple[Box, float]]
    leaders: Sequence[Line]
    anchors: Sequence[Anchor]

    def best(self, anchor: Anchor, bounds: Box) -> Box:
        """The box that covers and crosses least, and is near."""
        return min(_candidates(anchor, bounds), key=lambda found: found[1] + self.cost(anchor, found[0]))[0]

    def cost(self, anchor: Anchor, box: Box) -> float:
        """The weighted pixels that a box covers, and 80 for each leader or point that its own leader meets."""
        line = leader(anchor, box)
        met = sum(_cross(line, other) for other in self.leaders) + sum(_near(line, other) for other in self.anchors)
        return sum(weight * box.overlap(other) for other, weight in self.covered) + 80 * met


def leader(anchor: Anchor, box: Box) -> Line:
    """The line from an anchor to the nearest point of its label."""
    return Line(anchor.x, anchor.y, min(max(anchor.x, box.left), box.right), min(max(anchor.y, box.top), box.bottom))


def _cross(one: Line, other: Line) -> bool:
    """Whether two lines cross."""

    def side(line: Line, x: float, y: float) -> bool:
        return (line.x2 - line.x1) * (y - line.y1) > (line.y2 - line.y1) * (x - line.x1)

    return side(one, other.x1, other.y1) != side(one, other.x2, other.y2) and (
        side(other, one.x1, one.y1) != side(other, one.x2, one.y2)
    )


def _near(line: Line, anchor: Anchor) -> bool:
    """Whether a line passes by the mark of another anchor, and could be taken for its own."""
    across, down = line.x2 - line.x1, line.y2 - line.y1
    along = ((anchor.x - line.x1) * across + (anchor.y - line.y1) * down) / (across**2 + down**2 or 1.0)
    at = min(max(along, 0.0), 1.0)
    return at > 0 and math.hypot(line.x1 + at * across - anchor.x, line.y1 + at * down - anchor.y) < 8


def _candidates(anchor: Anchor, bounds: Box) -> list[tuple[Box, float]]:
    """Boxes around the anchor, ever farther, and what each costs by its distance and side; at least one."""
    found = []
    for distance in (9, 16, 26, 38, 54, 72, 92, 116):
        for step in range(16):
            across, down = math.cos(step * math.pi / 8), math.sin(step * math.pi / 8)
            left = anchor.x + across * distance + (across - 1) * anchor.width / 2
            top = anchor.y + down * distance + (down - 1) * anchor.height / 2
            box = Box(left, top, left + anchor.width, top + anchor.height)
            if bounds.holds(box):
                found.append((box, 2.5 * distance + 8 * (1 - across)))
    left = min(max(anchor.x, bounds.left), bounds.right - anchor.width)
    top = min(max(anchor.y, bounds.top), bounds.bottom - anchor.height)
    return found or [(Box(left, top, left + anchor.width, top + anchor.height), 0.0)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions on a line apart to `gap`, as little as possible, and keep them from `low` to `high`.

    Neighbours that are too near form a group around their mean, and groups that then meet are joined. Where there is
    no room for such gaps they are smaller.
    """
    gap = min(gap, (high - low) / max(1, len(positions) - 1))

    def start(group: Sequence[int]) -> float:
        length = gap * (len(group) - 1)
        middle = sum(positions[index] for index in group) / len(group)
        return max(low, min(middle - length / 2, high - length))

    groups: list[list[int]] = []
    for index in sorted(range(len(positions)), key=lambda index: positions[index]):
        groups.append([index])
        while len(groups) > 1 and start(groups[-1]) < start(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = {index: start(group) + gap * rank for group in groups for rank, index in enumerate(group)}
    return [moved[index] for index in range(len(positions))]
