"""Learning curves: how fast each technique learns, by epoch or by training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from smidgen.report import numbers
from smidgen.report.chart import Axis, Format, framed
from smidgen.report.entries import Entry
from smidgen.report.lines import Drawn, draw, room_for
from smidgen.report.numbers import Metric
from smidgen.report.scales import Scale, span, ticks
from smidgen.report.svg import markup

Value = Literal["validation_score", "validation_loss"]
Against = Literal["epoch", "seconds"]

_UNITS = ((3600, "h"), (60, "min"), (1, "s"))


def curves(entries: Sequence[Entry], metric: Metric, value: Value, against: Against, layout: Format) -> Markup | None:
    """One line a technique with its label at the right end; None when no technique has such points."""
    lines = [(entry, line) for entry in entries if (line := _line(entry, metric, value, against))]
    if not lines:
        return None
    plot = room_for([entry for entry, _ in lines], layout)
    x = Scale(*_x_range([at for _, line in lines for at, _ in line], against), plot.left, plot.right)
    y = Scale(
        *span((height for _, line in lines for _, height in line), least=metric.shortest_axis), plot.bottom, plot.top
    )
    told = [f"{entry.label}: {metric.written(line[-1][1])}{metric.unit} at the end" for entry, line in lines]
    svg = framed(
        layout,
        plot,
        _x_axis(x, against, layout),
        Axis(
            y,
            [(height, metric.tick(height)) for height in ticks(y.low, y.high, 6)],
            f"Validation {metric.heading.lower()}",
        ),
        f"Validation {metric.word} by {'epoch' if against == 'epoch' else 'time'}. {'; '.join(told)}.",
    )
    drawn = [
        Drawn(entry, [(x(at), y(height)) for at, height in line], text)
        for (entry, line), text in zip(lines, told, strict=True)
    ]
    draw(svg, layout, plot, drawn)
    return markup(svg)


def _line(entry: Entry, metric: Metric, value: Value, against: Against) -> list[tuple[float, float]]:
    """The points that have both coordinates, on the scale on which the metric is shown."""
    found = ((getattr(point, against), getattr(point, value)) for point in entry.technique.curve)
    return [(at, metric.shown(height)) for at, height in found if at is not None and height is not None]


def _x_range(values: Sequence[float], against: Against) -> tuple[float, float]:
    """Time from 0 on, epochs from the first one on, unless that is the only one."""
    low, high = (min(values) if against == "epoch" else 0.0), max(values)
    return (low, high) if high > low else (0.0, max(high, 1e-6))


def _x_axis(x: Scale, against: Against, layout: Format) -> Axis:
    if against == "seconds":
        length, unit = next((length, unit) for length, unit in _UNITS if x.high >= 2 * length or unit == "s")
        times = ticks(0.0, x.high / length, layout.steps)
        return Axis(x, [(at * length, f"{at:g}") for at in times], f"Training time, {unit}")
    whole = [at for at in ticks(x.low, x.high, layout.steps) if at == round(at)]
    return Axis(x, [(at, numbers.count(at)) for at in whole], "Epoch")
