"""Labels and ticks go where they can be read."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

from hypothesis import example, given
from hypothesis import strategies as st

from smidgen.report.labels import Anchor, Box, place, spread, text_width
from smidgen.report.scales import Scale, decades, log_ticks, span, ticks
from smidgen.report.svg import document

BOUNDS = Box(0, 0, 900, 400)


def test_labels_of_points_that_lie_close_together_do_not_cover_each_other() -> None:
    anchors = [Anchor(400 + 12 * index, 200 + 5 * (index % 3), 110, 16) for index in range(8)]
    boxes = place(anchors, [], BOUNDS)
    assert all(one.overlap(other) == 0 for one, other in itertools.combinations(boxes, 2))
    assert all(BOUNDS.holds(box) for box in boxes)


def test_a_label_alone_stands_to_the_right_of_its_point() -> None:
    (box,) = place([Anchor(400, 200, 100, 16)], [], BOUNDS)
    assert 400 < box.left < 415
    assert box.top < 200 < box.bottom


def test_a_label_too_wide_for_the_chart_is_still_placed() -> None:
    assert len(place([Anchor(10, 10, 2000, 16)], [], BOUNDS)) == 1


@given(st.lists(st.floats(0, 300), min_size=1, max_size=20))
def test_spread_labels_keep_their_order_and_their_distance(positions: list[float]) -> None:
    moved = spread(positions, 15, 0, 300)
    ordered = [moved[index] for index in sorted(range(len(positions)), key=lambda index: positions[index])]
    assert all(later - earlier >= 15 - 1e-6 for earlier, later in itertools.pairwise(ordered))
    assert -1e-6 <= min(moved) <= max(moved) <= 300 + 1e-6


def test_labels_with_room_around_them_stay_where_they_are() -> None:
    assert spread([200, 20, 100], 15, 0, 300) == [200, 20, 100]


def test_more_labels_than_there_is_room_for_come_closer() -> None:
    assert spread([50.0] * 5, 15, 0, 40) == [0, 10, 20, 30, 40]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(-0.9, 0.0)  # whose first tick is a rounding below the axis
def test_ticks_are_few_and_lie_within_the_axis(low: float, width: float) -> None:
    low, high = span([low, low + width], least=1.0)
    found = ticks(low, high, 6)
    assert 2 <= len(found) <= 8
    assert low - 1e-6 * width <= found[0] < found[-1] <= high + 1e-6 * width + 1e-6


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=9))
def test_a_logarithmic_axis_holds_every_value_and_has_ticks(values: list[int]) -> None:
    low, high = decades(values)
    scale = Scale(low, high, 0, 100, logarithmic=True)
    assert all(0 < scale(value) < 100 for value in values)
    assert len(log_ticks(low, high)) >= 2


def test_wide_letters_take_their_width() -> None:
    assert text_width("模型", 10) == 20
    assert text_width("ab", 10) < 12


def test_a_drawing_can_be_read_whatever_its_words_are() -> None:
    svg = document(10, 10, title="a\x01b\x1f", style="")
    assert "a�b�" in ET.tostring(ET.fromstring(ET.tostring(svg)), encoding="unicode")
