"""The comparison as a table for the terminal, 80 columns wide; drawn again after each technique while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from smidgen.report import numbers
from smidgen.report.entries import Entry, entries_of
from smidgen.report.numbers import Metric, metric_named
from smidgen.report.results import Comparison

_STYLES = {"running": "bold", "failed": "red"}


def print_table(comparison: Mapping[str, Any]) -> Table:
    """The techniques in the order in which they run, with what is known of each so far.

    Args:
        comparison: the contents of compare.json, also before it is whole: the status of a technique is then
            "waiting" or "running", and its numbers are missing.

    Returns:
        A table for rich to print, readable from 80 columns on.

    Raises:
        ValueError: a value has the wrong type, such as a text where a number belongs.
    """
    results = Comparison.model_validate(comparison)
    metric = metric_named(results.metric)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Technique")  # the only column that may wrap when the terminal is narrow
    for heading in (metric.title, "Diff.", "Trained", "Time", "Memory", "Disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries_of(results):
        table.add_row(Text(entry.label), *_cells(entry, metric))
    return table


def _cells(entry: Entry, metric: Metric) -> list[Text]:
    row = entry.technique
    if not row.done:
        return [Text(row.status, style=_STYLES.get(row.status, "dim"))]
    return [
        _score(entry, metric),
        Text("" if entry.is_baseline else metric.difference(row.difference)),
        Text(numbers.percent(row.share)),
        Text(numbers.duration(row.seconds)),
        Text(numbers.size(row.peak_memory_bytes)),
        Text(numbers.size(row.disk_bytes)),
    ]


def _score(entry: Entry, metric: Metric) -> Text:
    """A score with its 95 % interval as one figure, the longer of its two sides: 86.2 ±3.5."""
    row = entry.technique
    text = Text(metric.score(row.score), style="bold")
    if row.score is not None and row.low is not None and row.high is not None:
        side = metric.shown(max(row.score - row.low, row.high - row.score))
        text.append(f" ±{metric.written(side)}", style="not bold dim")
    return text
