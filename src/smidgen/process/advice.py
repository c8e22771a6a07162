"""Which technique to use, in words that follow from the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smidgen.report import numbers
from smidgen.report.numbers import MINUS, Metric, metric_named

MARGIN = 0.01
"""What counts as as good as full fine-tuning: a point of accuracy, or 1 % of its loss."""

Row = dict[str, Any]


def advise(
    techniques: Sequence[Row], metric_name: str, baseline: str, *, test_rows: int, seeds: int
) -> tuple[str | None, str]:
    """Choose a technique and say why.

    The choice is the best on the validation rows that is no full fine-tuning and, where full fine-tuning was measured,
    within a point of it there. What it then scores on the test rows, by which nothing was chosen, is said, and whether
    these can tell it from full fine-tuning.

    Args:
        techniques: the `techniques` of compare.json, those that are done with their numbers.
        metric_name: what `score` measures.
        baseline: the name of full fine-tuning.
        test_rows: how many rows the scores are of.
        seeds: of how many runs each score is the mean.

    Returns:
        The recommended technique's name, or None, and the advice in sentences.
    """
    chosen, advice = _chosen(techniques, metric_name, baseline, "test rows" if seeds == 1 else "test rows and seeds")
    compared = any(row["status"] == "done" and row["name"] != baseline for row in techniques)
    if compared and metric_name == "accuracy" and 1 / test_rows > MARGIN:
        advice += (
            f" One answer counts for {100 / test_rows:.1f} points: {test_rows} test rows are too few to see a "
            f"difference of {100 * MARGIN:g}."
        )
    if chosen is not None and seeds == 1:
        advice += " This is one seed: how another would come out is not in the intervals."
    failed = [row["title"] for row in techniques if row["status"] == "failed"]
    return chosen, advice + (f" Not compared, since it failed: {', '.join(failed)}." if failed else "")


def _chosen(techniques: Sequence[Row], metric_name: str, baseline: str, judges: str) -> tuple[str | None, str]:
    metric = metric_named(metric_name)
    done = [row for row in techniques if row["status"] == "done"]
    full = next((row for row in done if row["name"] == baseline), None)
    others = sorted(
        (row for row in done if row is not full), key=lambda row: (-metric.good(row["validation"]), row["trained"])
    )
    if not others:
        return None, "No technique but full fine-tuning was measured." if full else "No technique was measured."
    best = others[0]
    if full is None:
        advice = (
            f"{best['title']} is the best on the validation rows: {_scored(best, metric)} on the test rows, training "
            f"{numbers.percent(best['share'])} of the parameters."
        )
        if not any(row["name"] == baseline for row in techniques):  # nor has it failed, nor is it still to come
            advice += " Add full to the compared techniques to see what full fine-tuning would give."
        return best["name"], advice
    within = [row for row in others if metric.is_as_good(row["validation"], full["validation"], MARGIN)]
    if not within:
        return None, (
            f"No technique comes within {_margin_words(metric)} of full fine-tuning on the validation rows in this "
            f"budget. The nearest is {best['title']}: {_scored(best, metric)} on the test rows, where full fine-tuning "
            f"has {metric.score(full['score'])}, for {_cost(best)}. Train longer, or raise its size, before giving it "
            "up."
        )
    chosen = within[0]
    advice = (
        f"Use {chosen['title']}, the best on the validation rows: {_scored(chosen, metric)} on the test rows, "
        f"{_against(chosen, metric, judges)}. It trains {_cost(chosen)}."
    )
    smallest = min(within, key=lambda row: row["disk_bytes"])
    if smallest["disk_bytes"] < chosen["disk_bytes"] / 2:
        advice += (
            f" The smallest within {_margin_words(metric)} of full fine-tuning there is {smallest['title']}: "
            f"{_scored(smallest, metric)}, {numbers.size(smallest['disk_bytes'])} a task."
        )
    return chosen["name"], advice


def _margin_words(metric: Metric) -> str:
    return "1 point" if metric.percent else "1 %"


def _scored(row: Row, metric: Metric) -> str:
    return f"{metric.word} {metric.score(row['score'])}{metric.unit}"


def _against(row: Row, metric: Metric, judges: str) -> str:
    """The difference to full fine-tuning, and whether what it is judged by can tell the two apart."""
    low, high = row["difference_low"], row["difference_high"]
    words = metric.difference(row["difference"]).lstrip(f"+{MINUS}")
    side = "above" if row["difference"] > 0 else "below"
    said = "the same as full fine-tuning" if float(words) == 0 else f"{words} {side} full fine-tuning"
    if low is None or high is None:
        return said
    can = "" if low > 0 or high < 0 else "cannot "
    return f"{said} (95 % interval {metric.difference_interval(low, high)}: the {judges} {can}tell the two apart)"


def _cost(row: Row) -> str:
    return f"{numbers.percent(row['share'])} of the parameters and takes {numbers.size(row['disk_bytes'])} a task"
