"""Two finished runs on the same test rows: which is better, and whether the difference is more than chance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.recipe import METRICS, load_recipe
from smidgen.process.statistics import difference, mcnemar, per_row
from smidgen.report.numbers import metric_named


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How two runs differ.

    Attributes:
        metric: what they are judged by.
        scores: of the first and of the second.
        difference: the first less the second.
        interval: its 95 % interval: a paired bootstrap over the test rows.
        margin: how far apart two runs may be and count as the same, in the metric's own unit.
        verdict: "better" and "worse", of the first, if the interval leaves out 0; "same", if the 90 % interval is
            within the margin, as two one-sided tests at 5 % have it, and 3 rows in all are; otherwise "open".
        only_first: rows that the first alone has right; None where rows are not right or wrong.
        only_second: likewise.
        p: the chance of so uneven a split of those rows, or a more uneven one, between runs that are as good: McNemar's
            exact test. Where it is 0.05 or more, the interval has 0 in it.
    """

    metric: str
    scores: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    margin: float
    verdict: str
    only_first: int | None
    only_second: int | None
    p: float | None


def contrast(first: Path, second: Path, *, margin: float) -> Contrast:
    """Compare two runs, row by row.

    Args:
        first: the output folder of a finished run.
        second: likewise, on the same data.
        margin: how far apart they may be and count as the same: of a share such as accuracy itself, 0.01 a point; of a
            loss as a part of the second's.

    Raises:
        UserError: a folder is no finished run, or the two were not tested on the same rows.
    """
    ours, theirs = _tested(first), _tested(second)
    if ours["data"] != theirs["data"]:
        raise UserError(
            f"{first} and {second} were trained and tested on different rows, so that no row can be paired."
        )
    metric = METRICS[load_recipe(first / "recipe.yaml").task]
    written = metric_named(metric)
    scores = float(ours["test"][metric]), float(theirs["test"][metric])
    margin = written.margin(margin, scores[1])
    rows = per_row([ours["test"]]), per_row([theirs["test"]])
    if metric == "loss" and not np.array_equal(rows[0].wholes, rows[1].wholes):
        raise UserError(
            f"{first} and {second} cut the answers into different tokens, so that a token's loss is not the same thing."
        )
    low, high = difference(*rows)
    close_low, close_high = difference(*rows, level=0.9)
    if written.percent:  # where no row differs the bootstrap knows nothing; 3 in so many rows may (the rule of three)
        few = 3 / rows[0].parts.shape[1]
        close_low, close_high = min(close_low, -few), max(close_high, few)
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) != written.lower_is_better else "worse"
    else:
        verdict = "same" if -margin <= close_low and close_high <= margin else "open"
    return Contrast(metric, scores, scores[0] - scores[1], (low, high), margin, verdict, *_split(ours, theirs))


def _tested(folder: Path) -> dict[str, Any]:
    if not (folder / "metrics.json").is_file() or not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the output folder of a finished `smidgen train`.")
    metrics: dict[str, Any] = files.read_json(folder / "metrics.json")
    if "test" not in metrics:
        raise UserError(f"{folder} is not a run of `smidgen train`, and has no test split.")
    if metrics["test"] is None:
        raise UserError(f"{folder} was not scored on the test split (score_test: false), so that there is nothing yet.")
    return metrics


def _split(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int | None, int | None, float | None]:
    if "predictions" not in ours["test"]:
        return None, None, None
    right = [np.equal(run["test"]["predictions"], run["test"]["targets"]) for run in (ours, theirs)]
    first, second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return first, second, mcnemar(first, second)
