"""Portability: an adapter of one task as the start of another's, over numbers of training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen import files, manifest
from smidgen.attaching import load
from smidgen.combining import combine
from smidgen.errors import UserError
from smidgen.process.data import TaskData
from smidgen.process.finding import Finding
from smidgen.process.models import load_model, quietly
from smidgen.process.opening import reopen
from smidgen.process.recipe import Recipe
from smidgen.process.runs import Run
from smidgen.process.studies.checks import check_tasks
from smidgen.process.studies.little_data import (
    JUDGED,
    Curve,
    area,
    cell_of,
    chart_of,
    few_run,
    few_sizes,
    rows_of,
    standing,
)
from smidgen.process.technique import Part, TechniqueSpec
from smidgen.process.trainer import Trainer, titles_of
from smidgen.process.words import listed
from smidgen.report.numbers import count, metric_named
from smidgen.stacking import adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSION = "adapter-fusion"

SOURCES = "sources.json"
"""What a folder was made of: hashes of the adapters."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to begin.

    Attributes:
        label: in words.
        spec: what is trained.
        changes: fields of the recipe that say where it begins.
        new: the name of the arm that begins anew.
    """

    label: str
    spec: TechniqueSpec
    changes: Mapping[str, Any]
    new: str


def study_portability(recipe: Recipe, data: TaskData, trainer: Trainer) -> Finding:
    """Each technique on the recipe's task: started anew, from an adapter of another task, and from all of them.

    Raises:
        UserError: the recipe has no `study.tasks`, or its data have fewer rows than are to be drawn.
    """
    tasks = recipe.study.tasks
    if not tasks:
        raise UserError(
            "study.tasks is empty: name the data of other tasks, whose adapters this one may start from, such as "
            "{topics: {train: topics.csv}}."
        )
    notes = check_tasks(recipe, data)
    sizes = (*few_sizes(recipe, data), len(data.train))
    sources = {(spec.slug, name): _source(recipe, spec, name) for spec in recipe.compare for name in tasks}
    ended = dict(zip(sources, trainer.train(list(sources.values())), strict=True))
    arms: dict[str, Arm] = {}
    for spec in recipe.compare:
        folders = {name: sources[spec.slug, name].folder for name in tasks if ended[spec.slug, name] is not None}
        arms |= _arms(recipe, spec, folders, trainer)
    measured = trainer.train_each(
        {f"{arm} {size}": _runs(recipe, data, arm, arms[arm], size) for arm in arms for size in sizes}
    )
    curves: dict[str, Curve] = {}
    for arm in arms:
        for size in sizes:
            if f"{arm} {size}" in measured:
                curves.setdefault(arm, {})[size] = measured[f"{arm} {size}"]
    return _finding(recipe, curves, sizes, arms, notes)


def _source(recipe: Recipe, spec: TechniqueSpec, name: str) -> Run:
    """The run of another task that gives the adapter to start from."""
    folder = f"sources/{spec.slug}/{name}"
    return Run.of(recipe, spec, recipe.seeds[0], folder=folder, changes={"data": recipe.study.tasks[name]})


def _runs(recipe: Recipe, data: TaskData, name: str, arm: Arm, size: int) -> list[Run]:
    """An arm's runs on that many rows; those of the arm that begins anew are those of other studies too."""
    folder = None if name == arm.new else f"portability/{name}"
    if size == len(data.train):
        return [
            Run.of(recipe, arm.spec, seed, folder=folder and f"{folder}-s{seed}", changes=arm.changes)
            for seed in recipe.seeds
        ]
    return [
        few_run(recipe, data, arm.spec, size, draw, folder=folder and f"{folder}-n{size}-d{draw}", changes=arm.changes)
        for draw in range(recipe.study.draws)
    ]


def _arms(recipe: Recipe, spec: TechniqueSpec, folders: Mapping[str, Path], trainer: Trainer) -> dict[str, Arm]:
    """The ways in which a technique may begin, given its runs of other tasks."""
    title, new = titles_of(recipe)[spec.slug], spec.slug
    arms = {new: Arm(f"{title}, anew", spec, {}, new)}
    for name, folder in folders.items():
        arms[f"{new}-from-{name}"] = Arm(f"{title} from {name}", spec, {"start": str(folder)}, new)
    for name, folder in folders.items() if recipe.task != "generation" else ():  # which has no head
        base = Path(recipe.output) / "bases" / spec.slug / name
        try:
            _write_base(folder, base)
        except ValueError as error:
            trainer.tell(f"{title} of {name} cannot be put under a new head: {error}")
            break
        head = TechniqueSpec.parse("head")
        arms[f"{new}-head-{name}"] = Arm(f"A head on {title} of {name}", head, {"model": str(base)}, new)
    if len(folders) > 1:
        if spec.name == "pfeiffer":
            members = ", ".join(str(folder / "adapter") for folder in folders.values())
            fusion = TechniqueSpec.parse({"name": FUSION, "adapters": members})
            arms[f"{new}-fusion"] = Arm(f"AdapterFusion of {listed(list(folders))}", fusion, {}, new)
        mean = Path(recipe.output) / "means" / spec.slug
        try:
            of_mean = _write_mean(recipe, spec, list(folders.values()), mean)
            arms[f"{new}-mean"] = Arm(f"{title} from the mean", of_mean, {"start": str(mean)}, new)
        except ValueError as error:
            trainer.tell(f"No mean of {title}'s adapters: {error}")
    return arms


def _write_base(source: Path, folder: Path) -> None:
    """Write the model without its head, a source's adapter merged into it.

    Raises:
        ValueError: the adapter cannot be merged.
    """
    if _is_of(folder, [source]):
        return
    job = reopen(source, precision="fp32")
    job.adapter.merge()
    base: PreTrainedModel = job.model.base_model  # type: ignore[assignment]
    with quietly(), files.new_folder(folder) as new:
        base.save_pretrained(new)
        job.tokenizer.save_pretrained(new)
        files.write_json(new / SOURCES, _hashes([source]))


def _write_mean(recipe: Recipe, spec: TechniqueSpec, sources: Sequence[Path], folder: Path) -> TechniqueSpec:
    """Write the mean of the sources' adapters, and what technique that is, with the entry's rates.

    Raises:
        ValueError: they have none.
    """
    if changed := [method.title for method in spec.methods() if not method.keeps_base]:
        raise ValueError(f"{changed[0]} keeps no base model to add a mean to.")
    model, _ = load_model(recipe.model, recipe.task, ("a", "b"), seed=0, precision="fp32")  # their heads stay behind
    for place, source in enumerate(sources):
        load(model, source / "adapter", name=f"a{place}", head=False)
    weights = {f"a{place}": 1 / len(sources) for place in range(len(sources))}
    is_product = any(delta.mergeable for _, _, delta in adapters(model)["a0"].entries())
    mean = combine(model, weights, name="mean", how="sum" if is_product else "mean")
    if not _is_of(folder, sources):
        mean.save(folder / "adapter")
        files.write_json(folder / SOURCES, _hashes(sources))
    parts = tuple(Part(method.name, {}, spec.parts[0].learning_rate) for method in mean.methods)
    return dataclasses.replace(spec, parts=parts)


def _is_of(made: Path, sources: Sequence[Path]) -> bool:
    """Whether a folder was made of these runs as they are."""
    return (made / SOURCES).is_file() and files.read_json(made / SOURCES) == _hashes(sources)


def _hashes(sources: Sequence[Path]) -> list[str]:
    return [manifest.hash_of(source / "adapter") for source in sources]


def _finding(
    recipe: Recipe,
    curves: Mapping[str, Curve],
    sizes: Sequence[int],
    arms: Mapping[str, Arm],
    notes: tuple[str, ...],
) -> Finding:
    metric = metric_named(recipe.metric)
    return Finding(
        title="Does it carry over to another task?",
        answer=_answer(curves, arms, recipe.metric),
        headings=("Start", *(f"{count(size)} rows" for size in sizes), "Mean over the curve"),
        table=[
            (
                arms[name].label,
                *(cell_of(curve.get(size), recipe.metric) for size in sizes),
                metric.score(area(curve, sizes, recipe.metric)),
            )
            for name, curve in curves.items()
        ],
        chart=chart_of({name: (arms[name].label, curve) for name, curve in curves.items()}, recipe.metric),
        notes=(
            f"{recipe.study.draws} draws of each number of rows; behind ± the standard deviation. What starts from "
            "another task keeps that task's adapter and goes on training it under a new head; a head alone is trained "
            f"on the model with the adapter merged into it. {JUDGED}",
            *notes,
        ),
        rows=rows_of(curves, recipe.metric),
    )


def _answer(curves: Mapping[str, Curve], arms: Mapping[str, Arm], metric_name: str) -> str:
    sentences = [
        f"{arms[name].label}: {standing(curve, curves[arms[name].new], metric_name)}."
        for name, curve in curves.items()
        if name != arms[name].new and arms[name].new in curves
    ]
    return f"Against the same technique begun anew: {' '.join(sentences) or 'nothing else ran to its end.'}"
