"""How sure a score is: bootstrap intervals over test rows and seeds, and paired differences.

Arrays are (seeds, rows): what each seed's run scored on each test row, such as 1 for a right answer and 0 for a
wrong one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

DRAWS = 10_000
LEVEL = 0.95


def interval(scores: Scores, weights: Scores | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean score.

    Rows and seeds are both drawn again with replacement, so that the interval covers another test set of the same kind
    and another run.

    Args:
        scores: (seeds, rows).
        weights: (rows,), what each row counts, such as its tokens; None: all the same.
        seed: of the draws.

    Returns:
        The lower and the upper end.
    """
    means = _means(scores, weights, seed)
    return _ends(means)


def difference(ours: Scores, theirs: Scores, weights: Scores | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of mean(ours) - mean(theirs), both drawn on the same rows and the same seeds.

    Raises:
        ValueError: the two do not have the same rows and seeds.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"The scores are {ours.shape} and {theirs.shape}: paired scores need the same seeds and rows.")
    return _ends(_means(ours - theirs, weights, seed))


def _means(scores: Scores, weights: Scores | None, seed: int) -> Scores:
    """The mean of each draw: (DRAWS,)."""
    random = np.random.default_rng(seed)
    seeds, rows = scores.shape
    weighed = np.ones(rows) if weights is None else weights
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        counts = np.bincount(random.integers(rows, size=rows), minlength=rows) * weighed
        chosen = scores if seeds == 1 else scores[random.integers(seeds, size=seeds)]
        means[draw] = (chosen @ counts).mean() / counts.sum()
    return means


def _ends(means: Scores) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
