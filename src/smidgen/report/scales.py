"""Scales and ticks: from the values of an axis to pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` onto pixels from `start` to `end`, evenly or by their logarithm.

    Args:
        low: the value at `start`; above 0 when logarithmic.
        high: the value at `end`; above `low`.
        start: pixels.
        end: pixels; below `start` for an axis that points up.
        logarithmic: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def span(values: Iterable[float], *, margin: float = 0.06, least: float) -> tuple[float, float]:
    """The range of the values with a margin (a share of it) on both sides, at least `least` wide."""
    known = list(values)
    low, high = min(known), max(known)
    room = max((high - low) * margin, (least - (high - low)) / 2)
    return low - room, high + room


def decades(values: Iterable[float]) -> tuple[float, float]:
    """The range of positive values for a logarithmic axis: a margin on both sides, and at least one decade."""
    low, high = span((math.log10(value) for value in values), margin=0.08, least=1.0)
    return float(10**low), float(10**high)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [
        min(max(index * step, low), high) for index in range(first, last + 1)
    ]  # a rounding beyond an end is the end


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten from `low` to `high`; twice and five times them too where only few lie there."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [float(factor * 10**power) for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            break
    return found
