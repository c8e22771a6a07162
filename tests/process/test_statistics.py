"""Intervals cover what they say they cover, and agree with a second way to compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from smidgen.process.scores import class_scores, span_scores
from smidgen.process.spans import Span
from smidgen.process.statistics import Ratios, beyond_chance, difference, interval, mcnemar, per_row


def each(scores: np.ndarray) -> Ratios:
    """Scores of rows that count the same."""
    return Ratios(scores, np.ones(scores.shape))


def test_one_seed_gives_scipy_s_bootstrap() -> None:
    scores = np.random.default_rng(0).random((1, 200))
    expected = bootstrap((scores[0],), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1))
    assert interval(each(scores)) == pytest.approx(tuple(expected.confidence_interval), abs=3e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smidgen.process.statistics.DRAWS", 1000)
    random = np.random.default_rng(0)
    covered = 0
    for draw in range(40):
        low, high = interval(each((random.random((1, 150)) < 0.8).astype(float)), seed=draw)
        covered += low <= 0.8 <= high
    assert covered >= 34


def test_seeds_that_differ_widen_the_interval() -> None:
    rows = (np.arange(200) % 2).astype(float)[None]
    alike = np.repeat(rows, 3, axis=0)
    apart = np.concatenate([rows, rows * 0, rows * 0 + 1])
    width = {name: np.subtract(*interval(each(scores))) for name, scores in (("alike", alike), ("apart", apart))}
    assert width["apart"] < 2 * width["alike"] < 0  # low - high


def test_the_same_answers_differ_by_nothing() -> None:
    scores = (np.random.default_rng(0).random((2, 50)) < 0.7).astype(float)
    assert difference(each(scores), each(scores)) == (0.0, 0.0)


def test_pairing_is_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    theirs = (random.random((1, 300)) < 0.8).astype(float)
    ours = theirs.copy()
    ours[0, :10] = 1.0
    low, high = difference(each(ours), each(theirs))
    assert 0 <= low <= high < 0.05


@pytest.mark.parametrize(("ahead", "apart"), [(5, False), (6, True)])
def test_a_handful_of_rows_is_chance_where_mcnemar_says_so(ahead: int, apart: bool) -> None:
    theirs = np.ones((1, 500))
    ours = theirs.copy()
    theirs[0, :ahead] = 0.0
    assert (mcnemar(ahead, 0) < 0.05) == apart
    assert (difference(each(ours), each(theirs))[0] > 0) == apart
    assert (difference(each(theirs), each(ours))[1] < 0) == apart


def test_equal_differences_of_a_few_runs_are_no_certainty() -> None:
    right, wrong = [1] * 10, [0, *[1] * 9]
    runs = [[{"accuracy": np.mean(own), "predictions": own, "targets": right}] * 2 for own in (right, wrong)]
    low, high = beyond_chance(*runs, "accuracy")
    assert low < 0 < 0.1 < high


@pytest.mark.parametrize("task", ["classes", "spans", "answers"])
def test_rows_add_up_to_the_task_s_own_score(task: str) -> None:
    random = np.random.default_rng(0)
    if task == "classes":
        test = class_scores(random.integers(0, 3, 50).tolist(), random.integers(0, 3, 50).tolist(), ["a", "b", "c"])
        score = test["accuracy"]
    elif task == "spans":
        known = [[Span(0, n + 1, "a") for n in range(row % 3)] for row in range(30)]
        found = [[*own[: row % 2], Span(5, 9, "a")] for row, own in enumerate(known)]
        test = span_scores(found, known, ["a"])
        score = test["f1"]
    else:
        losses, tokens = random.random(30), random.integers(1, 9, 30)
        test = {"row_losses": losses.tolist(), "row_tokens": tokens.tolist()}
        score = float((losses * tokens).sum() / tokens.sum())
    rows = per_row([test, test])
    assert rows.parts.shape == rows.wholes.shape == (2, len(rows.parts[0]))
    np.testing.assert_allclose(rows.parts.sum(1) / rows.wholes.sum(1), score)


def runs_of(accuracies: Sequence[float], rows: int) -> list[dict[str, Any]]:
    """Runs of which each has its first rows right."""
    targets = np.ones(rows, int)
    found = [(np.arange(rows) < round(share * rows)).astype(int) for share in accuracies]
    return [{"accuracy": float(own.mean()), "predictions": own, "targets": targets} for own in found]


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_where_runs_differ_much_the_interval_is_student_s(level: float) -> None:
    ours, theirs = runs_of([0.9, 0.6, 0.75], 4000), runs_of([0.5, 0.55, 0.52], 4000)
    scores = [[run["accuracy"] for run in own] for own in (ours, theirs)]
    expected = ttest_rel(*scores).confidence_interval(level)
    assert beyond_chance(ours, theirs, "accuracy", level=level) == pytest.approx(tuple(expected))


def test_where_rows_are_few_the_interval_is_the_bootstrap_s() -> None:
    ours, theirs = runs_of([0.9] * 8, 20), runs_of([0.5] * 8, 20)
    expected = difference(per_row(ours), per_row(theirs))
    assert beyond_chance(ours, theirs, "accuracy") == pytest.approx(expected)


def test_rows_count_by_what_their_score_is_out_of() -> None:
    parts, wholes = np.array([[1000.0, 0.0] * 20]), np.array([[1000.0, 1e-9] * 20])
    assert interval(Ratios(parts, wholes)) == pytest.approx((1.0, 1.0))


def test_a_ratio_s_interval_is_scipy_s() -> None:
    random = np.random.default_rng(0)
    wholes = random.integers(1, 9, (1, 200)).astype(float)
    parts = np.floor(wholes * random.random((1, 200)))
    expected = bootstrap(
        (parts[0], wholes[0]),
        lambda part, whole, axis: part.sum(axis) / whole.sum(axis),
        method="percentile",
        paired=True,
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    )
    assert interval(Ratios(parts, wholes)) == pytest.approx(tuple(expected.confidence_interval), abs=3e-3)


def test_two_ratios_are_drawn_on_the_same_rows() -> None:
    random = np.random.default_rng(0)
    wholes = random.integers(2, 9, (1, 300)).astype(float)
    parts = np.floor(wholes * random.random((1, 300)))
    low, high = difference(Ratios(parts, wholes), Ratios(parts, wholes + (np.arange(300) < 5)))
    assert 0 <= low <= high < 0.02


def test_a_draw_without_anything_to_count_is_no_score() -> None:
    wholes = np.array([[2.0, 2.0, *[0.0] * 38]])  # a perfect model, and spans in two rows of forty
    assert interval(Ratios(wholes, wholes)) == (1.0, 1.0)


def test_rows_of_which_none_counts_have_no_score() -> None:
    assert interval(Ratios(np.zeros((1, 5)), np.zeros((1, 5)))) == (0.0, 0.0)


def test_scores_of_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and rows"):
        difference(each(np.zeros((1, 3))), each(np.zeros((1, 4))))


def test_the_ends_are_plain_numbers_which_json_can_hold() -> None:
    runs = [
        [{"accuracy": share, "predictions": [0, 1, right], "targets": [0, 1, 1]} for share, right in own]
        for own in ([(1.0, 1), (2 / 3, 0)], [(2 / 3, 0), (2 / 3, 0)])
    ]
    ends = beyond_chance(*runs, "accuracy")
    assert [type(end) for end in ends] == [float, float]
