"""Numbers as people read them: 1.3 %, 294,912, 41 s, 0.9 GB, 86.2. A missing number is an en dash."""

from __future__ import annotations

import math
from dataclasses import dataclass

MISSING = "–"
MINUS = "−"
ROUNDING = 1e-9
"""What a difference of two scores may be off by: 0.87 - 0.86 is above 0.01."""

_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))


def count(value: float | None) -> str:
    """A whole number with its thousands apart: 294,912."""
    return MISSING if value is None else f"{value:,.0f}"


def compact(value: float) -> str:
    """A whole number in short, for the ticks of an axis: 300, 10 k, 22.7 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{_short(value / limit)}{unit}"
    return _short(value)


def short(value: float) -> str:
    """A number with two places, 1,234.56; a very large one by its power of ten."""
    return f"{value:,.2f}" if abs(value) < 1e7 else f"{value:.1e}"


def percent(share: float | None) -> str:
    """A share of one as a percentage with two digits that count: 46 %, 1.3 %, 0.44 %, 0.0062 %."""
    if share is None:
        return MISSING
    value = 100 * share
    if value == 0 or abs(value) >= 10:
        return f"{value:.0f} %"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f} %"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that count: 0.8 s, 41 s, 4 min 10 s, 1 h 5 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{_short(seconds)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    large, small, units = (whole // 60, whole % 60, ("min", "s"))
    if whole >= 3600:
        large, small, units = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    return f"{large} {units[0]} {small} {units[1]}" if small else f"{large} {units[0]}"


def size(number_of_bytes: float | None) -> str:
    """Bytes in decimal units, in the next one from a half of it on: 300 B, 25 kB, 1.2 MB, 0.9 GB."""
    if number_of_bytes is None:
        return MISSING
    value, unit = next(
        (number_of_bytes / length, unit) for length, unit in _SIZES if number_of_bytes >= length / 2 or length == 1
    )
    return f"{_strip(f'{value:.2f}') if 0 < value < 1 else _short(value)} {unit}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, by a true minus; what rounds to zero has none: +1.2, −0.4, 0.0."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def _short(value: float) -> str:
    return _strip(f"{value:.1f}") if abs(value) < 99.95 else f"{value:,.0f}"


def _strip(text: str) -> str:
    return text.rstrip("0").rstrip(".")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How the scores of one metric are written, and which of two is the better."""

    title: str
    percent: bool = False
    lower_is_better: bool = False

    def good(self, score: float) -> float:
        """The score, or where lower is better its negative: of two, the larger is the better."""
        return -score if self.lower_is_better else score

    def margin(self, share: float, of: float) -> float:
        """How far from a score counts as the same: a share of one itself, so that 0.01 is a point; of a loss a part."""
        return share if self.percent else share * abs(of)

    def is_as_good(self, score: float, other: float, share: float) -> bool:
        """Whether a score is better than another, or worse by no more than the margin."""
        return self.good(score) >= self.good(other) - self.margin(share, other) - ROUNDING

    @property
    def heading(self) -> str:
        """The title with the unit that its numbers leave out: Accuracy, %."""
        return f"{self.title}, %" if self.percent else self.title

    @property
    def word(self) -> str:
        """The title inside a sentence: accuracy, F1 of spans."""
        return self.title if self.title[1:2].isdigit() else self.title[:1].lower() + self.title[1:]

    @property
    def unit(self) -> str:
        """What follows a number that stands by itself: ' %', or nothing."""
        return " %" if self.percent else ""

    def score(self, value: float | None) -> str:
        """A score without its unit: 86.2, or 1.234 for a loss."""
        return MISSING if value is None else self.written(self.shown(value))

    def difference(self, value: float | None) -> str:
        """A signed difference of two scores: −0.4."""
        return MISSING if value is None else signed(self.shown(value), self.digits)

    def interval(self, low: float | None, high: float | None) -> str:
        """An interval of scores: 83.1–89.0; empty when it was not measured."""
        return "" if low is None or high is None else f"{self.score(low)}–{self.score(high)}"

    def difference_interval(self, low: float | None, high: float | None) -> str:
        """An interval of differences: −2.0 to +1.2; empty when it was not measured."""
        return "" if low is None or high is None else f"{self.difference(low)} to {self.difference(high)}"

    def shown(self, value: float) -> float:
        """A score on the scale on which it is shown: percentages for a share."""
        return 100 * value if self.percent else value

    def written(self, shown: float) -> str:
        """A number that is already on the scale on which it is shown: 86.2."""
        return f"{shown:.{self.digits}f}"

    def tick(self, shown: float) -> str:
        """The same along an axis, without zeros that say nothing: 86, 0.25."""
        return f"{round(shown, 6):g}"

    @property
    def digits(self) -> int:
        """Digits behind the point."""
        return 1 if self.percent else 3

    @property
    def shortest_axis(self) -> float:
        """The least that an axis spans, so that a difference in the last digit does not look like a mountain."""
        return 4.0 if self.percent else 0.02


_METRICS = {
    "accuracy": Metric(title="Accuracy", percent=True),
    "f1": Metric(title="F1 of spans", percent=True),
    "macro_f1": Metric(title="Macro-F1", percent=True),
    "exact_match": Metric(title="Exact match", percent=True),
    "loss": Metric(title="Loss", lower_is_better=True),
    "perplexity": Metric(title="Perplexity", lower_is_better=True),
}


def metric_named(name: str) -> Metric:
    """The metric of that name; an unknown one is a plain number, higher being better."""
    return _METRICS.get(name) or Metric(title=name.replace("_", " ").capitalize())
