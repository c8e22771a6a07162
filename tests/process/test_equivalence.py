from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from smidgen.process.equivalence import equivalence, holm, power, seeds_needed, verdict

differences = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=12)


@given(differences, st.floats(0.1, 3))
def test_the_p_value_is_that_of_the_worse_of_two_one_sided_t_tests(values: list[float], margin: float) -> None:
    if np.std(values, ddof=1) < 1e-6:
        return
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert equivalence(values, margin).p == pytest.approx(max(above, below), abs=1e-9)


@given(differences, st.floats(0.1, 3))
def test_passing_at_5_percent_is_an_interval_of_90_percent_within_the_margin(
    values: list[float], margin: float
) -> None:
    found = equivalence(values, margin)
    if abs(found.p - 0.05) > 1e-9:
        assert (found.p < 0.05) == (-margin < found.low and found.high < margin)


@pytest.mark.parametrize(("deviation", "normal"), [(0.5, 3), (1.0, 9), (2.0, 35)])
def test_the_seeds_that_are_needed_are_a_few_more_than_a_known_deviation_needs(deviation: float, normal: int) -> None:
    values = [deviation / math.sqrt(2), -deviation / math.sqrt(2)]
    assert equivalence(values, 1.0).deviation == pytest.approx(deviation)
    assert normal < equivalence(values, 1.0).seeds_needed <= normal + 2


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
def test_as_many_seeds_show_it_in_80_of_100_studies_and_one_fewer_does_not(ratio: float) -> None:
    random, needed = np.random.default_rng(0), seeds_needed(ratio)
    for seeds, chance in ((needed, power(ratio, needed)), (needed - 1, power(ratio, needed - 1))):
        values = random.normal(0, ratio, (20_000, seeds))
        errors = values.std(1, ddof=1) / math.sqrt(seeds)
        shown = np.abs(values.mean(1)) + stats.t.ppf(0.95, seeds - 1) * errors < 1
        assert shown.mean() == pytest.approx(chance, abs=0.015)
    assert power(ratio, needed) >= 0.8 > power(ratio, needed - 1)


def test_no_chance_in_the_differences_is_certainty() -> None:
    assert equivalence([0.2, 0.2], 1.0).p == 0.0
    assert equivalence([1.2, 1.2], 1.0).p == 1.0


def test_equal_differences_are_believed_as_far_as_the_least_deviation() -> None:
    assert equivalence([0.2, 0.2], 1.0, least=0.5).deviation == 0.5
    assert equivalence([0.2, 0.2], 1.0, least=2.0).p > 0.05
    assert equivalence([0.2, 0.9], 1.0, least=0.1).deviation == pytest.approx(np.std([0.2, 0.9], ddof=1))


def test_one_seed_says_nothing() -> None:
    with pytest.raises(ValueError, match="Two seeds at least are needed to know about chance, got 1"):
        equivalence([0.1], 1.0)


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "lower_is_better", "said"),
    [
        ([0.1, -0.1, 0.05], False, "same"),
        ([-3.0, -3.1, -2.9], False, "worse"),
        ([3.0, 3.1, 2.9], False, "better"),
        ([3.0, 3.1, 2.9], True, "worse"),
        ([3.0, -3.1, 0.2], False, "open"),
        ([0.7, 0.9, 1.1], False, "open"),  # above 0, and not beyond the margin
    ],
)
def test_the_verdict(values: list[float], lower_is_better: bool, said: str) -> None:
    found = equivalence(values, 1.0)
    assert verdict(found, found.p, 1.0, lower_is_better=lower_is_better) == said
