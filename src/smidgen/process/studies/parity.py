"""Parity: is a technique as good as full fine-tuning, within a point?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from smidgen.errors import UserError
from smidgen.process.data import TaskData
from smidgen.process.equivalence import SIGNIFICANT, Equivalence, Verdict, equivalence, holm, verdict
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.recipe import Recipe
from smidgen.process.studies.checks import needs_full, several_seeds
from smidgen.process.trainer import Trainer, scores_of, titles_of
from smidgen.process.words import listed
from smidgen.report.numbers import metric_named

VERDICTS: dict[Verdict, str] = {
    "same": "as good",
    "better": "better",
    "worse": "worse",
    "open": "not shown",
}


def study_parity(recipe: Recipe, data: TaskData, trainer: Trainer) -> Finding:
    """Two one-sided tests of each technique against full fine-tuning, paired by seed, with Holm's correction.

    Raises:
        UserError: there is no full fine-tuning to compare with, or a single seed.
    """
    full = needs_full(recipe)
    several_seeds(recipe)
    metric = metric_named(recipe.metric)
    measured = {name: scores_of(own, recipe.metric) for name, own in trainer.train_compared().items()}
    if full not in measured:
        raise UserError(
            f"Full fine-tuning failed, so that there is nothing to compare with: {'; '.join(trainer.failures.values())}"
        )
    margin = metric.margin(recipe.study.margin, float(np.mean(measured[full])))
    titles, others = titles_of(recipe), [name for name in measured if name != full]
    if not others:
        raise UserError(f"Every technique but full fine-tuning failed: {_reasons(trainer)}")
    level = SIGNIFICANT / len(others)
    least = 1 / len(data.test) if metric.percent else 0.0
    found = {
        name: equivalence(np.subtract(measured[name], measured[full]).tolist(), margin, level=level, least=least)
        for name in others
    }
    chances = dict(zip(found, holm([own.p for own in found.values()]), strict=True))
    verdicts = {
        name: verdict(own, chances[name], margin, lower_is_better=metric.lower_is_better) for name, own in found.items()
    }
    within = f"{100 * margin:g} point{'' if margin == 0.01 else 's'}" if metric.percent else f"{margin:.3g}"
    shown = metric.shown
    return Finding(
        title="Is it as good as full fine-tuning?",
        answer=_answer(titles, found, verdicts, within, len(recipe.seeds)),
        headings=(
            "Technique",
            metric.heading,
            "To full",
            f"{100 * (1 - 2 * level):.3g} % interval",
            "p",
            "Verdict",
            "Seeds needed",
        ),
        table=[
            (titles[full], metric.score(float(np.mean(measured[full]))), "", "", "", "", ""),
            *(
                (
                    titles[name],
                    metric.score(float(np.mean(measured[name]))),
                    metric.difference(own.difference),
                    metric.difference_interval(own.low, own.high),
                    f"{chances[name]:.3f}",
                    VERDICTS[verdicts[name]],
                    str(own.seeds_needed),
                )
                for name, own in found.items()
            ),
        ],
        chart=Chart(
            kind="intervals",
            title=f"Difference to full fine-tuning, with its interval; the band is {within} to either side",
            across=f"{metric.heading} less full fine-tuning's",
            up="",
            lines=[
                Line(name, titles[name], [Point(0, shown(own.difference), shown(own.low), shown(own.high))])
                for name, own in found.items()
            ],
            marks=(-shown(margin), 0.0, shown(margin)),
            baseline=full,
        ),
        notes=_notes(recipe, within),
        rows=[
            {
                "technique": name,
                "scores": measured[name],
                **own._asdict(),
                "holm": chances[name],
                "verdict": verdicts[name],
            }
            for name, own in found.items()
        ],
    )


def _reasons(trainer: Trainer) -> str:
    return "; ".join(f"{run}: {error}" for run, error in trainer.failures.items())


def _answer(
    titles: Mapping[str, str],
    found: Mapping[str, Equivalence],
    verdicts: Mapping[str, Verdict],
    within: str,
    seeds: int,
) -> str:
    groups: dict[Verdict, list[str]] = {}
    for name, own in verdicts.items():
        groups.setdefault(own, []).append(name)
    told = {kind: listed([titles[name] for name in names]) for kind, names in groups.items()}
    sentences = []
    if "same" in told:
        sentences.append(f"As good as full fine-tuning within {within} ({seeds} seeds): {told['same']}.")
    if "better" in told:
        sentences.append(f"Better by more than {within}: {told['better']}.")
    if "worse" in told:
        sentences.append(f"Worse by more than {within}: {told['worse']}.")
    if "open" in told:
        sentences.append(f"Not shown either way with {seeds} seeds: {told['open']}.")
        few = [name for name in groups["open"] if found[name].seeds_needed > seeds]
        if few:
            which = "they are" if len(few) > 1 else f"{titles[few[0]]} is"
            needed = listed([str(found[name].seeds_needed) for name in few])
            sentences.append(f"If {which} as good, {needed} seeds have a chance of 80 % to show it.")
        if near := [titles[name] for name in groups["open"] if name not in few]:
            sentences.append(
                f"The difference of {listed(near)} is neither none, which as many seeds would show, nor clearly beyond "
                f"{within}."
            )
    return " ".join(sentences)


def _notes(recipe: Recipe, within: str) -> Sequence[str]:
    return (
        f"Two one-sided t tests on the {len(recipe.seeds)} paired differences ask whether a difference of {within} or "
        "more can be ruled out; p is the larger of the two, after Holm's correction for the number of techniques, and "
        "must be below 0.05. The intervals, and the seeds for 80 % power, share those 5 % among the techniques "
        "(Bonferroni). The test rows are taken as given: another test set is not part of the interval.",
    )
