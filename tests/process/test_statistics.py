"""Intervals cover what they say they cover, and agree with a second way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from smidgen.process.statistics import difference, interval


def test_one_seed_gives_scipy_s_bootstrap() -> None:
    scores = np.random.default_rng(0).random((1, 200))
    expected = bootstrap((scores[0],), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1))
    assert interval(scores) == pytest.approx(tuple(expected.confidence_interval), abs=3e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smidgen.process.statistics.DRAWS", 1000)
    random = np.random.default_rng(0)
    covered = 0
    for draw in range(40):
        low, high = interval((random.random((1, 150)) < 0.8).astype(float), seed=draw)
        covered += low <= 0.8 <= high
    assert covered >= 34


def test_seeds_that_differ_widen_the_interval() -> None:
    rows = (np.arange(200) % 2).astype(float)[None]
    alike = np.repeat(rows, 3, axis=0)
    apart = np.concatenate([rows, rows * 0, rows * 0 + 1])
    width = {name: np.subtract(*interval(scores)) for name, scores in (("alike", alike), ("apart", apart))}
    assert width["apart"] < 2 * width["alike"] < 0  # low - high


def test_the_same_answers_differ_by_nothing() -> None:
    scores = (np.random.default_rng(0).random((2, 50)) < 0.7).astype(float)
    assert difference(scores, scores) == (0.0, 0.0)


def test_pairing_is_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    theirs = (random.random((1, 300)) < 0.8).astype(float)
    ours = theirs.copy()
    ours[0, :10] = 1.0
    low, high = difference(ours, theirs)
    assert 0 <= low <= high < 0.05


def test_weights_count_rows_by_their_tokens() -> None:
    scores, weights = np.array([[1.0, 0.0]]), np.array([1000.0, 1e-9])
    low, high = interval(np.repeat(scores, 20, axis=1), np.repeat(weights, 20))
    assert low == pytest.approx(1.0)
    assert high == pytest.approx(1.0)


def test_scores_of_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and rows"):
        difference(np.zeros((1, 3)), np.zeros((1, 4)))
