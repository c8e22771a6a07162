"""Whether a technique is as good as full fine-tuning: two one-sided tests over the seeds, not a glance.

That two runs do not differ significantly says little where there are few of them. These tests turn it round: they ask
whether a difference as large as the margin can be ruled out, on either side (Schuirmann, 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

SIGNIFICANT = 0.05
POWER = 0.8
QUANTILES = 400

Verdict = Literal["same", "better", "worse", "open"]


class Equivalence(NamedTuple):
    """How close two ways of training are, of which each seed gives a pair of scores.

    Attributes:
        difference: the mean of ours less theirs.
        low: the lower end of its interval, by Student's t: what lies within the margin passes both tests.
        high: the upper end.
        p: the larger of the two tests' p-values.
        deviation: the standard deviation of the seeds' differences.
        seeds_needed: how many give a chance of 80 % to pass both tests at their level, if the two are equal.
    """

    difference: float
    low: float
    high: float
    p: float
    deviation: float
    seeds_needed: int


def equivalence(
    differences: Sequence[float], margin: float, *, level: float = SIGNIFICANT, least: float = 0.0
) -> Equivalence:
    """Test whether the mean of paired differences lies within the margin.

    Args:
        differences: of each seed, ours less theirs.
        margin: the largest difference that does not count; above 0.
        level: of each of the two tests; that of one among several techniques is smaller.
        least: the smallest deviation that is believed, such as one test row's: equal differences of two seeds are no
            certainty.

    Raises:
        ValueError: there are fewer than two seeds, so that nothing is known about chance.
    """
    from scipy.stats import t

    seeds = len(differences)
    if seeds < 2:
        raise ValueError(f"Two seeds at least are needed to know about chance, got {seeds}.")
    mean, deviation = float(np.mean(differences)), max(least, float(np.std(differences, ddof=1)))
    error = deviation / math.sqrt(seeds)
    if error:
        half = float(t.ppf(1 - level, seeds - 1)) * error
        p = float(t.sf((margin - abs(mean)) / error, seeds - 1))
    else:
        half, p = 0.0, float(abs(mean) >= margin)
    return Equivalence(mean, mean - half, mean + half, p, deviation, seeds_needed(deviation / margin, level))


def seeds_needed(ratio: float, level: float = SIGNIFICANT) -> int:
    """The fewest seeds with which two equal ways are shown to be the same in 80 % of studies.

    Args:
        ratio: of the paired differences' standard deviation to the margin.
        level: of each test.
    """
    seeds = 2
    while power(ratio, seeds, level) < POWER:
        seeds += 1 + seeds // 50  # to 2 % where there are many
    return seeds


def power(ratio: float, seeds: int, level: float = SIGNIFICANT) -> float:
    """The chance that both tests pass when the two are equal.

    The deviation that a study finds varies as the root of a chi-square over its degrees of freedom; given that, the
    mean must lie within what is left of the margin.
    """
    from scipy.stats import chi2, norm, t

    if not ratio:
        return 1.0
    freedom = seeds - 1
    found = ratio * np.sqrt(chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, freedom) / freedom)
    left = 1 - t.ppf(1 - level, freedom) * found / math.sqrt(seeds)
    within = 2 * norm.cdf(np.maximum(left, 0) * math.sqrt(seeds) / ratio) - 1
    return float(within.mean())


def holm(chances: Sequence[float]) -> list[float]:
    """P-values made larger, so that the chance that any of several tests passes by mistake is no larger (Holm, 1979).

    Args:
        chances: the p-value of each test.
    """
    adjusted, least = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        least = max(least, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = least
    return adjusted


def verdict(found: Equivalence, p: float, margin: float, *, lower_is_better: bool = False) -> Verdict:
    """What follows: the same within the margin, better or worse by more than it, or not enough seeds to say.

    Args:
        found: what was measured.
        p: its p-value, corrected for the number of tests.
        margin: the largest difference that does not count.
        lower_is_better: whether a small score is the better one.
    """
    if p < SIGNIFICANT:
        return "same"
    if found.low > margin or found.high < -margin:
        return "better" if (found.difference > 0) != lower_is_better else "worse"
    return "open"
