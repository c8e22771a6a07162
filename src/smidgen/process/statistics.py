"""How sure a score is: bootstrap intervals over test rows and seeds, and paired differences.

Every score is a ratio of two sums over the test rows: accuracy of right answers and answers, a loss of losses and
tokens, F1 of twice the right spans and all spans, found and true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

DRAWS = 10_000
LEVEL = 0.95
NUMBERS_AT_ONCE = 100_000


class Ratios(NamedTuple):
    """What each test row adds to the two sums of each seed's score: both (seeds, rows)."""

    parts: Scores
    wholes: Scores


def per_row(tests: Sequence[Mapping[str, Any]]) -> Ratios:
    """What each test row adds to the score of each seed, and out of how much.

    Args:
        tests: of each seed, the scores that `evaluate` gives.
    """

    def rows(field: str) -> Scores:
        return np.array([test[field] for test in tests], float)

    if "predictions" in tests[0]:
        right = rows("predictions") == rows("targets")
        return Ratios(right.astype(float), np.ones(right.shape))
    if "row_hits" in tests[0]:
        return Ratios(2 * rows("row_hits"), rows("row_spans"))
    return Ratios(rows("row_losses") * rows("row_tokens"), rows("row_tokens"))


def interval(scores: Ratios, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the seeds' mean score.

    Rows and seeds are both drawn again with replacement, so that the interval covers another test set of the same kind
    and another run.

    Args:
        scores: of each seed and row.
        seed: of the draws.

    Returns:
        The lower and the upper end.
    """
    return _ends(_means(scores, seed))


def difference(ours: Ratios, theirs: Ratios, *, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """The interval of our mean score less theirs, both drawn on the same rows and the same seeds.

    With one seed, and rows that are right or wrong, it has 0 in it wherever McNemar's exact test sees no difference at
    that level: where few rows differ, the bootstrap takes them for all that there could be.

    Args:
        ours: of each seed and row.
        theirs: of the same.
        seed: of the draws.
        level: the share of the draws in the interval.

    Raises:
        ValueError: the two do not have the same rows and seeds.
    """
    if ours.parts.shape != theirs.parts.shape:
        raise ValueError(
            f"The scores are {ours.parts.shape} and {theirs.parts.shape}: paired scores need the same seeds and rows."
        )
    low, high = _ends(_means(ours, seed) - _means(theirs, seed), level)
    if len(ours.parts) == 1 and _are_hits(ours) and _are_hits(theirs):
        ahead = ours.parts - theirs.parts
        if mcnemar(int((ahead > 0).sum()), int((ahead < 0).sum())) >= 1 - level:
            return min(low, 0.0), max(high, 0.0)
    return low, high


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """The chance of so uneven a split of the rows that one alone has right, or a more uneven one, between equals.

    Args:
        only_ours: rows that we alone have right.
        only_theirs: rows that they alone have right.
    """
    from scipy.stats import binomtest

    both = only_ours + only_theirs
    return float(binomtest(only_ours, both).pvalue) if both else 1.0


def beyond_chance(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], metric: str, *, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of our mean score less theirs that covers both the rows and the runs.

    It is the larger of two on each side: the paired bootstrap over rows and runs, which takes a few runs for all that
    there could be, and Student's t over the runs' differences, which knows nothing of other rows. Equal differences of
    a few runs are no certainty: no deviation of a share below that of one row is believed.

    Args:
        ours: of each run, the scores that `evaluate` gives.
        theirs: of the runs with the same seeds, on the same rows.
        metric: the score.
        level: of the interval.

    Returns:
        The lower and the upper end; without end where there is a single run, which says nothing about others.
    """
    from scipy.stats import t

    if len(ours) < 2:
        return -np.inf, np.inf
    rows = per_row(ours), per_row(theirs)
    low, high = difference(*rows, level=level)
    least = 0.0 if "row_losses" in ours[0] else 1 / rows[0].parts.shape[1]
    differences = np.subtract([run[metric] for run in ours], [run[metric] for run in theirs])
    deviation = max(least, float(np.std(differences, ddof=1)))
    half = float(t.ppf((1 + level) / 2, len(ours) - 1)) * deviation / math.sqrt(len(ours))
    mean = float(np.mean(differences))
    return min(low, mean - half), max(high, mean + half)


def _are_hits(scores: Ratios) -> bool:
    """Whether each row is right or wrong."""
    return bool(np.isin(scores.parts, (0, 1)).all() and (scores.wholes == 1).all())


def _means(scores: Ratios, seed: int) -> Scores:
    """The seeds' mean score in each draw, (DRAWS,); the draws depend on `seed` and the shape alone."""
    random = np.random.default_rng(seed)
    seeds, rows = scores.parts.shape
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    means = []
    for first in range(0, DRAWS, at_once):
        draws = min(at_once, DRAWS - first)
        drawn = random.integers(rows, size=(draws, rows)) + rows * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * rows).reshape(draws, rows).astype(float)
        parts, wholes = scores.parts @ counts.T, scores.wholes @ counts.T  # (seeds, draws)
        if seeds > 1:
            chosen = random.integers(seeds, size=(seeds, draws))
            parts, wholes = (np.take_along_axis(sums, chosen, 0) for sums in (parts, wholes))
        # rows of which none counts have no score
        means.append(np.where(wholes.all(0), (parts / np.where(wholes, wholes, 1)).mean(0), np.nan))
    return np.concatenate(means)


def _ends(means: Scores, level: float = LEVEL) -> tuple[float, float]:
    scored = means[~np.isnan(means)]
    low, high = np.quantile(scored, [(1 - level) / 2, (1 + level) / 2]) if len(scored) else (0.0, 0.0)
    return float(low), float(high)
