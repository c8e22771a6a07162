"""A comparison, a sweep, a study, or every technique's runs as a Markdown table for the docs.

python benchmarks/table.py runs/demo/compare.json
python benchmarks/table.py benchmarks/results/sweep-tweets.json
python benchmarks/table.py benchmarks/results/cost-minilm.json
python benchmarks/table.py benchmarks/results/every-banking77.json benchmarks/results/every-snips.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from smidgen import METHODS
from smidgen.report import numbers
from smidgen.report.numbers import metric_named


def comparison(result: dict[str, Any]) -> Iterator[str]:
    metric = metric_named(result["metric"])
    yield f"| technique | {metric.heading} | 95 % interval | to full | trained | time | memory | disk |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in result["techniques"]:
        if row["status"] == "done":
            cells = [
                row["title"],
                metric.score(row["score"]),
                metric.interval(row["low"], row["high"]),
                metric.difference(row["difference"]),
                numbers.percent(row["share"]),
                numbers.duration(row["seconds"]),
                numbers.size(row["peak_memory_bytes"]),
                numbers.size(row["disk_bytes"]),
            ]
            yield f"| {' | '.join(cells)} |"


def sweep(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| technique | learning rate | validation accuracy, % | loss | best epoch |"
    yield "|---|---|---|---|---|"
    for row in rows:
        technique = row["technique"]
        yield (
            f"| {technique['name']} | {technique['learning_rate']:g} | {100 * row['validation']:.1f} "
            f"| {row['validation_loss']:.3f} | {row['best_epoch']} |"
        )


def every(tasks: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Each task's mean over the seeds with their standard deviation, the best of the first task first; its costs."""
    yield f"| technique | {' | '.join(f'{task}, %' for task in tasks)} | trained | disk |"
    yield "|---" * (len(tasks) + 3) + "|"
    names = dict.fromkeys(row["technique"] for rows in tasks.values() for row in rows)
    means = {name: [mean(scores_of(rows, name) or [0.0]) for rows in tasks.values()] for name in names}
    for name in sorted(names, key=means.__getitem__, reverse=True):
        found = ([row for row in rows if row["technique"] == name] for rows in tasks.values())
        own = next(filter(None, found))
        cells = [
            f"[{METHODS[name].title}](techniques/{name}.md)",
            *(spread(scores_of(rows, name)) for rows in tasks.values()),
            numbers.percent(own[0]["share"]),
            numbers.size(own[0]["disk_bytes"]),
        ]
        yield f"| {' | '.join(cells)} |"


def scores_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    """A technique's scores, in %."""
    return [100 * row["score"] for row in rows if row["technique"] == name]


def spread(scores: list[float]) -> str:
    """Their mean and, of several, their standard deviation."""
    if not scores:
        return numbers.MISSING
    return f"{mean(scores):.1f}" + (f" ±{stdev(scores):.1f}" if len(scores) > 1 else "")


def finding(result: dict[str, Any]) -> Iterator[str]:
    """What a study found, as it prints it."""
    yield f"| {' | '.join(result['headings'])} |"
    yield "|" + "---|" * len(result["headings"])
    for cells in result["table"]:
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    files = {Path(name).stem: json.loads(Path(name).read_text("utf-8")) for name in sys.argv[1:]}
    found = next(iter(files.values()))
    if isinstance(found, list) and "seed" in found[0]:
        lines = every({name.removeprefix("every-"): rows for name, rows in files.items()})
    elif isinstance(found, list):
        lines = sweep(found)
    else:
        lines = finding(found) if "headings" in found else comparison(found)
    print("\n".join(lines))
