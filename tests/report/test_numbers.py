"""Numbers are written for people."""

from __future__ import annotations

import pytest

from smidgen.report import numbers
from smidgen.report.numbers import metric_named


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0129, "1.3 %"), (0.0044, "0.44 %"), (0.000062, "0.0062 %"), (1.0, "100 %"), (0.46, "46 %"), (0.0, "0 %")],
)
def test_a_share_has_two_digits_that_count(share: float, text: str) -> None:
    assert numbers.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.97, "10 s"),
        (41.2, "41 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (3900, "1 h 5 min"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [(0, "0 B"), (300, "300 B"), (25_000, "25 kB"), (1_180_000, "1.2 MB"), (9e8, "0.9 GB"), (91_000_000, "91 MB")],
)
def test_a_size_is_in_the_unit_that_keeps_it_short(length: float, text: str) -> None:
    assert numbers.size(length) == text


@pytest.mark.parametrize(("value", "text"), [(300, "300"), (10_000, "10 k"), (22_713_216, "22.7 M"), (2e9, "2 G")])
def test_the_ticks_of_an_axis_are_short(value: float, text: str) -> None:
    assert numbers.compact(value) == text


def test_accuracy_is_written_in_percent_and_its_difference_in_points_with_a_true_minus() -> None:
    accuracy = metric_named("accuracy")
    assert accuracy.heading == "Accuracy, %"
    assert accuracy.score(0.8624) == "86.2"
    assert accuracy.difference(-0.0041) == "−0.4"
    assert accuracy.difference(0.012) == "+1.2"
    assert accuracy.difference(-0.0001) == "0.0"
    assert accuracy.interval(0.831, 0.89) == "83.1–89.0"


def test_a_loss_is_a_plain_number_of_which_less_is_better() -> None:
    loss = metric_named("loss")
    assert loss.lower_is_better
    assert loss.score(1.2344) == "1.234"
    assert loss.difference_interval(-0.01, 0.02) == "−0.010 to +0.020"


def test_an_unknown_metric_is_a_plain_number() -> None:
    assert metric_named("word_error_rate").heading == "Word error rate"


def test_what_is_missing_is_an_en_dash_or_nothing() -> None:
    formats = (numbers.count, numbers.percent, numbers.duration, numbers.size, metric_named("accuracy").score)
    assert {written(None) for written in formats} == {"–"}
    assert metric_named("accuracy").interval(None, 0.9) == ""
