"""A comparison or a sweep as a Markdown table for the docs.

python benchmarks/table.py runs/demo/compare.json
python benchmarks/table.py benchmarks/results/sweep-tweets.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    print("\n".join(comparison(found) if isinstance(found, dict) else sweep(found)))
