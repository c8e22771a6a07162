"""Little data: how the score grows with the number of training rows, and where a technique is ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smidgen.errors import UserError
from smidgen.process.data import TaskData
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Metrics, Run, budget, steps_of
from smidgen.process.statistics import beyond_chance, interval, per_row
from smidgen.process.studies.checks import needs_full
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Trainer, scores_of, titles_of
from smidgen.process.words import listed
from smidgen.report.entries import within_sentence
from smidgen.report.numbers import Metric, count, metric_named

Curve = dict[int, list[Metrics]]
"""The runs of each number of rows."""


JUDGED = (
    "Ahead and behind mean that the 95 % interval of the paired difference leaves out 0, over rows and over draws. "
    "Each comparison is judged by itself, so that one in twenty of equals would seem so by chance."
)


def study_little_data(recipe: Recipe, data: TaskData, trainer: Trainer) -> Finding:
    """The score of each technique over numbers of rows, of which several draws are trained on.

    Raises:
        UserError: there is no full fine-tuning to compare with, or there are fewer rows than are to be drawn.
    """
    full, sizes = needs_full(recipe), few_sizes(recipe, data)
    runs = {
        f"{spec.slug} {size}": [few_run(recipe, data, spec, size, draw) for draw in range(recipe.study.draws)]
        for spec in recipe.compare
        for size in sizes
    }
    few, whole = trainer.train_each(runs), trainer.train_compared()
    curves: dict[str, Curve] = {
        spec.slug: {
            **{size: few[f"{spec.slug} {size}"] for size in sizes if f"{spec.slug} {size}" in few},
            **({len(data.train): whole[spec.slug]} if spec.slug in whole else {}),
        }
        for spec in recipe.compare
    }
    sizes = (*sizes, len(data.train))
    metric, titles = metric_named(recipe.metric), titles_of(recipe)
    return Finding(
        title="Is it better with little data?",
        answer=_answer({name: titles[name] for name in curves}, curves, full, recipe.metric),
        headings=("Technique", *(f"{count(size)} rows" for size in sizes), "Mean over the curve"),
        table=[
            (
                titles[name],
                *(cell_of(curve.get(size), recipe.metric) for size in sizes),
                metric.score(area(curve, sizes, recipe.metric)),
            )
            for name, curve in curves.items()
        ],
        chart=chart_of({name: (titles[name], curve) for name, curve in curves.items()}, recipe.metric, baseline=full),
        notes=(
            f"{recipe.study.draws} draws of each number of rows, and the recipe's seeds on all of them; behind ± the "
            "standard deviation. As many rows validate as train, at most; the test split is always whole. The mean "
            f"over the curve counts equal ratios of rows alike. {JUDGED}",
        ),
        rows=rows_of(curves, recipe.metric),
    )


def few_sizes(recipe: Recipe, data: TaskData) -> tuple[int, ...]:
    """The numbers of rows below all of them.

    Raises:
        UserError: more are wanted than there are, or the recipe draws some itself.
    """
    rows, sizes = len(data.train), recipe.study.sizes
    if recipe.data.rows is not None:
        raise UserError(f"data.rows={recipe.data.rows} is given, and this study draws rows by itself. Leave it out.")
    if sizes and sizes[-1] > rows:
        raise UserError(
            f"study.sizes={list(sizes)} goes beyond the {count(rows)} training rows. Leave out what is above: all rows "
            "are always the last."
        )
    return tuple(size for size in sizes if size < rows)


def few_run(
    recipe: Recipe,
    data: TaskData,
    spec: TechniqueSpec,
    size: int,
    draw: int,
    *,
    folder: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Run:
    """A run on few rows: with as many steps as on all of them, or `study.steps` if those are fewer.

    Patience is as many rows that are trained on, since an epoch of few rows is a few steps.
    """
    training, whole = recipe.training, len(data.train)
    steps = min(recipe.study.steps, steps_of(training, whole))
    if training.patience is not None:
        training = training.model_copy(update={"patience": math.ceil(training.patience * whole / size)})
    return Run.of(
        recipe,
        spec,
        draw,
        folder=folder or f"few/{spec.slug}-n{size}-d{draw}",
        changes={
            "data": recipe.data.model_copy(update={"rows": size, "draw": draw}),
            "training": budget(training, size, steps=steps),
            **(changes or {}),
        },
    )


def area(curve: Curve, sizes: Sequence[int], metric: str) -> float | None:
    """The mean score over the curve, by the logarithm of the number of rows; None if some are missing."""
    if any(size not in curve for size in sizes):
        return None
    means = [float(np.mean(scores_of(curve[size], metric))) for size in sizes]
    if len(sizes) == 1:
        return means[0]
    at = np.log(sizes)
    return float(np.trapezoid(means, at) / (at[-1] - at[0]))


def chart_of(curves: Mapping[str, tuple[str, Curve]], metric_name: str, *, baseline: str | None = None) -> Chart:
    """Lines over the number of rows, by the name that gives the colour: each with its label."""
    metric = metric_named(metric_name)
    return Chart(
        kind="lines",
        title=f"{metric.title} over the number of training rows",
        across="Training rows",
        up=metric.heading,
        is_logarithmic=True,
        shortest=metric.shortest_axis,
        lines=[
            Line(name, label, [_point(size, curve[size], metric_name, metric) for size in sorted(curve)])
            for name, (label, curve) in curves.items()
        ],
        baseline=baseline,
    )


def _point(size: int, found: Sequence[Metrics], metric_name: str, metric: Metric) -> Point:
    low, high = interval(per_row([run["test"] for run in found]))
    mean = float(np.mean(scores_of(found, metric_name)))
    return Point(size, metric.shown(mean), metric.shown(low), metric.shown(high))


def rows_of(curves: Mapping[str, Curve], metric: str) -> list[dict[str, Any]]:
    """Every score as a number."""
    return [
        {"technique": name, "rows": size, "scores": scores_of(found, metric)}
        for name, curve in curves.items()
        for size, found in sorted(curve.items())
    ]


def cell_of(found: Sequence[Metrics] | None, metric_name: str) -> str:
    """A table's cell: the mean of the scores and their standard deviation."""
    if found is None:
        return "failed"
    metric, scores = metric_named(metric_name), scores_of(found, metric_name)
    spread = f" ±{metric.score(float(np.std(scores, ddof=1)))}" if len(scores) > 1 else ""
    return f"{metric.score(float(np.mean(scores)))}{spread}"


def standing(curve: Curve, base: Curve, metric_name: str) -> str:
    """With which numbers of rows a curve is ahead of another one, behind, or neither beyond chance."""
    metric, states = metric_named(metric_name), dict[str, list[str]]()
    for size in sorted(set(curve) & set(base)):
        ours, theirs = ([run["test"] for run in found[size]] for found in (curve, base))
        low, high = beyond_chance(ours, theirs, metric_name)
        better = (low > 0) != metric.lower_is_better
        state = "not shown to differ" if low <= 0 <= high else "ahead" if better else "behind"
        states.setdefault(state, []).append(count(size))
    return ", ".join(f"{state} with {listed(sizes)} rows" for state, sizes in states.items()) or "not comparable"


def _answer(titles: Mapping[str, str], curves: Mapping[str, Curve], full: str, metric_name: str) -> str:
    base = curves.get(full)
    if not base:
        return "Full fine-tuning failed, so that there is nothing to compare with."
    sentences = [
        f"{titles[name]} is {standing(curve, base, metric_name)}." for name, curve in curves.items() if name != full
    ]
    return f"Against {within_sentence(titles[full])}: " + " ".join(sentences)
