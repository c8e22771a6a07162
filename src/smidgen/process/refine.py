"""Refinement: rounds that change which layers are trained and at what rank, kept only where they prove better.

Each round makes one change to the subset that is trained, led by what the layers still have to gain with the present
adapter (`identify`), and trains it anew with every seed. It is kept if the interval of the paired difference on the
validation rows leaves out 0, over rows and over seeds, at a level at which one of all rounds would by chance in 5 % of
refinements. The test split is scored for the first and the last, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from smidgen.errors import UserError
from smidgen.process import finding
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.identification import Ranks, Sensitivity, check_gradients, identify, places_of, technique_of
from smidgen.process.late_scores import scores_on
from smidgen.process.only_one import only_one
from smidgen.process.opening import prepare
from smidgen.process.recipe import Recipe
from smidgen.process.run_recipe import refuse_own
from smidgen.process.runs import Run, check_can_begin
from smidgen.process.statistics import beyond_chance
from smidgen.process.studies.checks import several_seeds
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Tell, Trainer
from smidgen.process.words import counted
from smidgen.report.findings import write_findings
from smidgen.report.numbers import count, metric_named

REFINED = "refined.yaml"
"""The recipe of what was kept, in the output folder."""

PART = 1 / 3
"""How many of the layers a change takes or gives."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What was tried, and what became of it.

    Attributes:
        change: in words.
        entry: the technique as a recipe has it.
        trained: how many parameters.
        score: the seeds' mean on the validation rows.
        difference: to what was kept before; None for the start.
        interval: the one that must leave out 0.
        kept: whether it is better beyond chance.
    """

    change: str
    entry: Any
    trained: int
    score: float
    difference: float | None = None
    interval: tuple[float, float] | None = None
    kept: bool = True


def refine(
    recipe: Recipe, *, command: str, at_once: int = 1, tell: Tell = lambda line: None
) -> tuple[list[Round], dict[str, str]]:
    """Refine a recipe's technique, and write refine.json and refined.yaml.

    Args:
        recipe: its `technique` is the start: a technique with ranks and targets; its `refine` says how many rounds.
        command: how a person would go on after Ctrl-C.
        at_once: how many runs share the machine.
        tell: hears of each run that ended.

    Returns:
        The history, the start first; and what went wrong with runs that failed, by their folders.

    Raises:
        UserError: the technique has no ranks, its layers cannot be looked at, or the start cannot be trained.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    check_can_begin(recipe)
    several_seeds(recipe)
    check_refinable(recipe.technique)
    check_gradients(recipe)
    output = Path(recipe.output)
    refuse_own(output / REFINED)
    with only_one(output):
        start = _start(recipe)
        trainer = Trainer(recipe, command=command, at_once=at_once, tell=tell)
        history = _rounds(recipe, start, trainer)
        last = [entry for entry in history if entry.kept][-1]
        spec = TechniqueSpec.parse(last.entry)
        recipe.model_copy(update={"technique": spec, "output": str(output / "refined")}).save(output / REFINED)
        tests = {name: _tested(recipe, entry) for name, entry in (("before", history[0]), ("after", last))}
        found = _finding(recipe, history, tests)
        about = {**finding.about(recipe, command, trainer.failures), "tests": tests}
        finding.write(found, about, output / "refine.json")
        write_findings({"refine": (found, about)}, recipe, output / "refine.html", what="Which layers?")
    return history, trainer.failures


@dataclasses.dataclass(frozen=True)
class _Start:
    """What the recipe's technique trains: the rank of each layer, and the number of the entry that gives it."""

    ranks: Ranks
    owners: dict[str, int]


def _rounds(recipe: Recipe, start: _Start, trainer: Trainer) -> list[Round]:
    metric = metric_named(recipe.metric)
    now = trainer.train(_runs(recipe, recipe.technique))
    if None in now:
        raise UserError(f"The start cannot be trained: {'; '.join(trainer.failures.values())}")
    spec, ranks = recipe.technique, start.ranks
    best = _validated(recipe, spec)
    trained = [metrics["trained"] for metrics in now if metrics is not None]
    history = [Round("the start", spec.written(), trained[0], _mean(best, recipe))]
    sensitivities: list[Sensitivity] = []
    waiting = list(CHANGES)
    while waiting and len(history) <= recipe.refine.rounds:
        sensitivities = sensitivities or identify(recipe, run=_runs(recipe, spec)[0].folder)
        name = waiting.pop(0)
        changed = CHANGES[name](ranks, sensitivities)
        if changed is None or changed == ranks:
            continue
        entries = technique_of(sensitivities, changed, like=recipe.technique, owners=start.owners)
        try:
            entry = TechniqueSpec.parse(entries)
        except ValueError as error:  # no such rank
            trainer.failures[name] = str(error)
            continue
        results = [metrics for metrics in trainer.train(_runs(recipe, entry)) if metrics is not None]
        if len(results) < len(recipe.seeds):
            continue
        scores = _validated(recipe, entry)
        low, high = beyond_chance(scores, best, recipe.metric, level=1 - 0.05 / recipe.refine.rounds)
        kept = metric.good(low) > 0 and metric.good(high) > 0
        score = _mean(scores, recipe)
        more = score - _mean(best, recipe)
        history.append(Round(name, entry.written(), results[0]["trained"], score, more, (low, high), kept))
        if kept:
            spec, ranks, best, sensitivities = entry, changed, scores, []
            waiting = [name, *(other for other in CHANGES if other != name)]  # what helped may help again
    return history


def _runs(recipe: Recipe, spec: TechniqueSpec) -> list[Run]:
    """A run for each seed; the start's are those of `smidgen compare`, since its test is scored in any case."""
    if spec == recipe.technique:
        return [Run.of(recipe, spec, seed) for seed in recipe.seeds]
    return [
        Run.of(recipe, spec, seed, folder=f"refine/{spec.slug}-s{seed}", changes={"score_test": False})
        for seed in recipe.seeds
    ]


def _validated(recipe: Recipe, spec: TechniqueSpec) -> list[dict[str, Any]]:
    """The scores of each seed on the validation rows."""
    return [scores_on(run.folder, "validation") for run in _runs(recipe, spec)]


def _mean(scores: Sequence[Mapping[str, Any]], recipe: Recipe) -> float:
    return float(np.mean([own[recipe.metric] for own in scores]))


def _start(recipe: Recipe) -> _Start:
    """What the recipe's technique trains.

    Raises:
        UserError: a layer is outside the blocks, where it could not be changed, or two entries train it.
    """
    adapter = prepare(recipe).adapter
    known = {place.name for place in places_of(adapter.model)}
    ranks: Ranks = {}
    owners: dict[str, int] = {}
    for number, (method, places) in enumerate(zip(adapter.methods, adapter.places, strict=True)):
        for place in places:
            if place.name not in known:
                raise UserError(f"refine changes layers inside the blocks, and {place.name} is outside. Give targets.")
            if place.name in ranks:
                raise UserError(f"refine gives a layer one rank, and two entries train {place.name}. Give targets.")
            ranks[place.name], owners[place.name] = getattr(method, "rank", 0), number
    return _Start(ranks, owners)


def check_refinable(spec: TechniqueSpec) -> None:
    """Raise a UserError unless a technique has ranks and targets to change.

    Args:
        spec: one technique, or several entries of the same.
    """
    methods = spec.methods()
    if any(not hasattr(own, "rank") or not hasattr(own, "targets") or own.name != methods[0].name for own in methods):
        raise UserError(
            f"technique={spec.name}: refine changes ranks and layers, which {methods[0].title} does not have, or "
            "shares with another technique. Start from lora, dora, rslora, or another with a rank and targets."
        )


def _most(layers: Sequence[Sensitivity], *, least: bool = False) -> list[Sensitivity]:
    """The third of the layers with the most to gain, or with the least; one at least."""
    ordered = sorted(layers, key=lambda layer: layer.share, reverse=not least)
    return ordered[: max(1, round(PART * len(ordered)))]


def _raise(ranks: Ranks, found: Sequence[Sensitivity]) -> Ranks | None:
    """Twice the rank where the most is left to gain."""
    trained = [layer for layer in found if ranks.get(layer.place)]
    return {**ranks, **{layer.place: 2 * ranks[layer.place] for layer in _most(trained)}}


def _widen(ranks: Ranks, found: Sequence[Sensitivity]) -> Ranks | None:
    """More layers: of the frozen ones those with the most to gain."""
    frozen = [layer for layer in found if not ranks.get(layer.place)]
    return {**ranks, **{layer.place: _usual(ranks) for layer in _most(frozen)}} if frozen else None


def _narrow(ranks: Ranks, found: Sequence[Sensitivity]) -> Ranks | None:
    """Fewer layers: without the trained ones that have the least to gain."""
    trained = [layer for layer in found if ranks.get(layer.place)]
    dropped = {layer.place for layer in _most(trained, least=True)}
    return {place: rank for place, rank in ranks.items() if place not in dropped} if len(trained) > 1 else None


def _other(ranks: Ranks, found: Sequence[Sensitivity]) -> Ranks | None:
    """The other part: the frozen layers instead of the trained ones."""
    frozen = [layer for layer in found if not ranks.get(layer.place)]
    return {layer.place: _usual(ranks) for layer in frozen} or None


def _usual(ranks: Ranks) -> int:
    return median_low([rank for rank in ranks.values() if rank])


CHANGES: dict[str, Callable[[Ranks, Sequence[Sensitivity]], Ranks | None]] = {
    "twice the rank where most is to gain": _raise,
    "more layers": _widen,
    "the other layers": _other,
    "fewer layers": _narrow,
}
"""What a round may try, by its name, in this order."""


def _tested(recipe: Recipe, entry: Round) -> list[float]:
    """The test scores of a round's seeds, which are measured when all is decided."""
    runs = _runs(recipe, TechniqueSpec.parse(entry.entry))
    return [float(scores_on(run.folder, "test")[recipe.metric]) for run in runs]


def _finding(recipe: Recipe, history: Sequence[Round], tests: Mapping[str, Sequence[float]]) -> Finding:
    metric = metric_named(recipe.metric)
    kept = [entry for entry in history[1:] if entry.kept]
    before, after = (float(np.mean(tests[when])) for when in ("before", "after"))
    answer = (
        f"{len(kept)} of {len(history) - 1} changes were better beyond chance and are kept: "
        f"{'; '.join(entry.change for entry in kept)}."
        if kept
        else f"{counted(history[1:], 'change')} tried, none better beyond chance: the start is kept."
    )
    tested = f"{metric.score(after)} after {metric.score(before)}" if kept else f"of the start: {metric.score(before)}"
    answer += f" Test {metric.word} {tested}{metric.unit}."
    return Finding(
        title="Which layers, refined",
        answer=answer,
        headings=("Change", "Trained", f"Validation {metric.heading}", "Difference", "Interval", "Kept"),
        table=[
            (
                entry.change,
                count(entry.trained),
                metric.score(entry.score),
                metric.difference(entry.difference) if entry.difference is not None else "",
                metric.difference_interval(*(entry.interval or (None, None))),
                "yes" if entry.kept else "no",
            )
            for entry in history
        ],
        chart=Chart(
            kind="lines",
            title=f"Validation {metric.word} of each change",
            across="Round",
            up=metric.heading,
            shortest=metric.shortest_axis,
            lines=[
                Line("tried", "tried", [Point(at, metric.shown(entry.score)) for at, entry in enumerate(history)]),
                Line(
                    "kept",
                    "kept",
                    [Point(at, metric.shown(entry.score)) for at, entry in enumerate(history) if entry.kept],
                ),
            ],
        ),
        notes=(
            "A change is kept if the interval of the paired difference on the validation rows leaves out 0, over rows "
            "and over seeds; its level is such that one of all rounds would by chance in 5 %. The test split was "
            "scored for the start and for what is kept at the end.",
        ),
        rows=[dataclasses.asdict(entry) for entry in history],
    )
