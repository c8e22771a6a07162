"""Score against trained parameters: what the parameters of each technique buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from smidgen.report import numbers
from smidgen.report.chart import Axis, Format, framed, group_of
from smidgen.report.entries import Entry
from smidgen.report.labels import Anchor, Box, leader, place, shorten, text_width
from smidgen.report.numbers import Metric
from smidgen.report.scales import Scale, decades, log_ticks, span, ticks
from smidgen.report.svg import add, add_marker, markup


@dataclass(frozen=True)
class _Mark:
    """A technique's place in pixels; `low` and `high` are the ends of its interval, its own height if it has none."""

    entry: Entry
    x: float
    y: float
    low: float
    high: float


def tradeoff(entries: Sequence[Entry], metric: Metric, layout: Format) -> Markup | None:
    """Score with its interval against trained parameters; None when fewer than two techniques have both.

    The baseline's score is a dashed line across, with a band of one point around it where scores are percentages.
    """
    known = [
        (entry, float(entry.technique.trained), metric.shown(entry.technique.score))
        for entry in entries
        if entry.technique.done and entry.technique.trained and entry.technique.score is not None
    ]
    if len(known) < 2:
        return None
    plot = layout.plot(right=16)
    x = Scale(*decades(trained for _, trained, _ in known), plot.left, plot.right, logarithmic=True)
    ends = [_ends(entry, metric, score) for entry, _, score in known]
    y = Scale(*span((end for pair in ends for end in pair), least=metric.shortest_axis), plot.bottom, plot.top)
    marks = [
        _Mark(entry, x(trained), y(score), y(low), y(high))
        for (entry, trained, score), (low, high) in zip(known, ends, strict=True)
    ]
    told = "; ".join(_told(entry, metric) for entry, _, _ in known)
    svg = framed(
        layout,
        plot,
        Axis(x, [(value, numbers.compact(value)) for value in log_ticks(x.low, x.high)], "Trained parameters (log)"),
        Axis(y, [(value, metric.tick(value)) for value in ticks(y.low, y.high, 6)], metric.heading),
        f"{metric.title} against trained parameters. {told}.",
    )
    for entry, _, score in known:
        if entry.is_baseline:
            top, bottom = max(plot.top, y(score + 1)), min(plot.bottom, y(score - 1))
            if metric.percent:
                across = {"x": plot.left, "width": plot.right - plot.left}
                add(svg, "rect", {"class": "band", "y": top, "height": bottom - top, **across})
            add(svg, "line", {"class": "baseline", "x1": plot.left, "x2": plot.right, "y1": y(score), "y2": y(score)})

    names = [shorten(mark.entry.label, layout.letters) for mark in marks]
    anchors = [
        Anchor(mark.x, mark.y, text_width(name, layout.font), layout.font + 3)
        for mark, name in zip(marks, names, strict=True)
    ]
    boxes = place(anchors, _obstacles(marks, plot), Box(plot.left, plot.top - 10, layout.width, plot.bottom))
    for mark, name, anchor, box in zip(marks, names, anchors, boxes, strict=True):
        group = group_of(svg, mark.entry, _told(mark.entry, metric))
        if (line := leader(anchor, box)).length > 12:
            add(group, "line", {"class": "leader", **line._asdict()})
        add(group, "line", {"class": "whisker", "x1": mark.x, "x2": mark.x, "y1": mark.low, "y2": mark.high})
        add_marker(group, mark.entry.shape, mark.x, mark.y, 5.5)
        add(group, "text", {"class": "label", "x": box.left, "y": box.bottom - 4}, name)
    return markup(svg)


def _obstacles(marks: Sequence[_Mark], plot: Box) -> list[tuple[Box, float]]:
    """What the labels should leave free, most of all the marks, then the whiskers and the baseline's line."""
    obstacles = [(Box(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7), 6.0) for mark in marks]
    obstacles += [(Box(mark.x - 2, mark.high, mark.x + 2, mark.low), 1.5) for mark in marks]
    obstacles += [(Box(plot.left, mark.y - 2, plot.right, mark.y + 2), 1.0) for mark in marks if mark.entry.is_baseline]
    return obstacles


def _ends(entry: Entry, metric: Metric, score: float) -> tuple[float, float]:
    low, high = entry.technique.low, entry.technique.high
    return (score, score) if low is None or high is None else (metric.shown(low), metric.shown(high))


def _told(entry: Entry, metric: Metric) -> str:
    interval = metric.interval(entry.technique.low, entry.technique.high)
    score = f"{metric.score(entry.technique.score)}{metric.unit}{f' ({interval})' if interval else ''}"
    return f"{entry.label}: {score}, {numbers.count(entry.technique.trained)} trained parameters"
