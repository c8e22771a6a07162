"""A comparison, a sweep, a study, or every technique's runs as a Markdown table for the docs.

python benchmarks/table.py runs/demo/compare.json
python benchmarks/table.py benchmarks/results/sweep-tweets.json
python benchmarks/table.py benchmarks/results/cost-minilm.json
python benchmarks/table.py benchmarks/results/every-banking77.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
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


def every(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The mean over the seeds and their standard deviation, the best first."""
    yield "| technique | score, % | deviation | trained | core seconds | disk |"
    yield "|---|---|---|---|---|---|"
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["technique"], []).append(row)
    for name, own in sorted(runs.items(), key=lambda item: -mean(row["score"] for row in item[1])):
        scores = [100 * row["score"] for row in own]
        cells = [
            f"[{METHODS[name].title}](techniques/{name}.md)",
            f"{mean(scores):.1f}",
            f"{stdev(scores):.1f}" if len(scores) > 1 else numbers.MISSING,
            numbers.percent(own[0]["share"]),
            f"{mean(row['core_seconds'] for row in own):.0f}",
            numbers.size(own[0]["disk_bytes"]),
        ]
        yield f"| {' | '.join(cells)} |"


def finding(result: dict[str, Any]) -> Iterator[str]:
    """What a study found, as it prints it."""
    yield f"| {' | '.join(result['headings'])} |"
    yield "|" + "---|" * len(result["headings"])
    for cells in result["table"]:
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    of_dict = finding if "headings" in found else comparison
    kind = of_dict if isinstance(found, dict) else every if "seed" in found[0] else sweep
    print("\n".join(kind(found)))
