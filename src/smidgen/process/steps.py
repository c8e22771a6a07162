"""The seven steps as one: pre-training, data, identification, subset, fine-tuning, evaluation, refinement.

Each is what its own command does, on what the one before has made, and a section of the page. What is finished is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen import files
from smidgen.errors import UserError
from smidgen.process import checkpoint, finding
from smidgen.process.data import load_data
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.identification import (
    Ranks,
    Sensitivity,
    allotted,
    check_gradients,
    identify,
    low_rank,
    technique_of,
)
from smidgen.process.inspection import inspect_data
from smidgen.process.opening import prepare
from smidgen.process.pretrain import pretrain
from smidgen.process.pretrain_recipe import PretrainRecipe
from smidgen.process.recipe import Recipe, load_recipe
from smidgen.process.refine import check_refinable, refine
from smidgen.process.runs import check_can_begin
from smidgen.process.saved_splits import are_of, save_splits
from smidgen.process.studies.checks import several_seeds
from smidgen.process.study import study
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Tell
from smidgen.report import numbers
from smidgen.report.findings import write_findings


def take_steps(
    recipe: Recipe, *, command: str, at_once: int = 1, tell: Tell = lambda line: None
) -> tuple[dict[str, Finding], dict[str, str]]:
    """Take a recipe through all steps, and write process.html into its output.

    Args:
        recipe: its `pretrain` is the first step, if it is there; its `identify.budget` what the subset may take.
        command: how a person would go on after Ctrl-C.
        at_once: how many runs share the machine.
        tell: hears of what is done.

    Returns:
        What each step found, and what went wrong with runs that failed, by their folders.

    Raises:
        UserError: a step cannot be taken; those before are kept.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    _check(recipe)
    output = Path(recipe.output)
    found: dict[str, Finding] = {}
    failures: dict[str, str] = {}

    def done(step: str, own: Finding) -> None:
        found[step] = own
        tell(f"{own.title}: {own.answer}")
        about = finding.about(recipe, command, failures)
        finding.write(own, about, output / "process" / f"{step}.json")
        sections = {name: (one, about) for name, one in found.items()}
        write_findings(sections, recipe, output / "process.html", what="From text to a refined model")

    done("pre-training", _pretrain(recipe))
    split = _with_splits(recipe)
    done("data", _inspect(split))
    layers = identify(split)
    done("identification", _identification(layers))
    ranks = _ranks(split, layers)
    chosen = split if ranks is None else _chosen(split, layers, ranks)
    done("subset", _subset(chosen, layers, ranks))
    parity, failed = study(_against_full(chosen), "parity", command=command, at_once=at_once, tell=tell)
    failures |= failed
    done("fine-tuning", dataclasses.replace(parity, title="5, 6 · Fine-tuning and evaluation"))
    _, failed = refine(chosen, command=command, at_once=at_once, tell=tell)
    failures |= failed
    refined, _ = finding.read(output / "refine.json")
    done("refinement", dataclasses.replace(refined, title="7 · Refinement"))
    return found, failures


def _check(recipe: Recipe) -> None:
    """Raise a UserError for what would stop a later step."""
    check_can_begin(recipe)
    several_seeds(recipe)
    check_gradients(recipe)
    if recipe.identify.budget is None:
        check_refinable(recipe.technique)
    output = Path(recipe.output)
    if (output / "runs").is_dir() and not (output / "splits").is_dir():
        raise UserError(
            f"{output} holds runs of another command, with splits of their own. Give `process` an output for itself: "
            "--set output=runs/NAME"
        )


def _pretrain(recipe: Recipe) -> Finding:
    own = recipe.pretrain
    title = "1 · Pre-training"
    if own is None:
        return Finding(title, f"The model is {recipe.model}, which is pre-trained.", (), (), None, (), ())
    folder = Path(own.output)
    metrics = _finished(own, folder)
    if metrics is None:
        metrics = pretrain(own, resume=checkpoint.exists(folder / "checkpoint"), quiet=True)
    before, after = (metrics[when]["perplexity"] for when in ("before", "after"))
    curve = metrics["curve"]
    points = [Point(point["epoch"], point["validation_loss"]) for point in curve]
    return Finding(
        title=title,
        answer=(
            f"Perplexity on text set aside was {numbers.short(before)} and is {numbers.short(after)} after "
            f"{numbers.count(metrics['tokens'])} tokens, in {numbers.duration(metrics['seconds'])}."
        ),
        headings=("Epoch", "Training loss", "Validation loss"),
        table=[
            (f"{point['epoch']:g}", f"{point['train_loss']:.3f}", f"{point['validation_loss']:.3f}") for point in curve
        ],
        chart=Chart("lines", "Loss on text set aside", "Epoch", "Loss", [Line("model", "model", points)]),
        notes=(),
        rows=curve,
    )


def _finished(own: PretrainRecipe, folder: Path) -> dict[str, Any] | None:
    """What a pre-training measured, if it was this one, of the text as it is, and its model is there."""
    if not (folder / "metrics.json").is_file() or not (folder / "model").is_dir():
        return None
    metrics: dict[str, Any] = files.read_json(folder / "metrics.json")
    with contextlib.suppress(UserError):  # text that is gone is no other one
        if metrics.get("text") != own.text_hash():
            return None
    return metrics if metrics.get("recipe") == own.fingerprint() else None


def _with_splits(recipe: Recipe) -> Recipe:
    """The recipe with its splits as files, written once, so that all that follows sees the same rows.

    Raises:
        UserError: they are of other data, or of data that have changed.
    """
    folder = Path(recipe.output) / "splits"
    whole = load_data(recipe.undrawn.data, recipe.task)
    if not folder.exists():
        save_splits(recipe, whole, folder)
    if not are_of(folder, recipe, whole):
        raise UserError(f"{folder} holds splits of other data. Remove {folder.parent}, or give another output.")
    return recipe.model_copy(update={"data": load_recipe(folder / "recipe.yaml").data})


def _ranks(recipe: Recipe, layers: Sequence[Sensitivity]) -> Ranks | None:
    """What the budget buys, which is kept: a time would buy something else tomorrow."""
    budget, path = recipe.identify.budget, Path(recipe.output) / "process" / "ranks.json"
    if budget is None:
        return None
    known = {"budget": budget, "recipe": recipe.fingerprint()}
    return dict(files.once(path, known, lambda: {"ranks": allotted(layers, recipe, budget)})["ranks"])


def _inspect(recipe: Recipe) -> Finding:
    inspected = inspect_data(prepare(recipe.undrawn))
    sizes = ", ".join(f"{numbers.count(rows)} to {split}" for split, rows in inspected.rows.items())
    looks = f"{len(inspected.findings)} things to look at" if inspected.findings else "nothing to look at"
    return Finding(
        title="2 · Task data",
        answer=f"{sizes}; {len(inspected.labels)} labels; {looks}.",
        headings=("What", "Summary"),
        table=[(one.title, one.summary) for one in inspected.findings],
        chart=None,
        notes=(*inspected.notes, *inspected.good, f"The splits are kept in {Path(recipe.data.train).parent}."),
        rows=[dataclasses.asdict(one) for one in inspected.findings],
    )


def _identification(layers: Sequence[Sensitivity]) -> Finding:
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    share = {(layer.kind, layer.block): 100 * layer.share for layer in layers}
    best = max(layers, key=lambda layer: layer.share)
    return Finding(
        title="3 · Parameter identification",
        answer=f"Most is to gain in {best.place}: {100 * best.share:.0f} % of what all {len(layers)} layers have.",
        headings=("Layer", *(f"block {place}" for place in range(len(blocks)))),
        table=[(kind, *(f"{share.get((kind, block), 0.0):.1f} %" for block in blocks)) for kind in kinds],
        chart=Chart(
            "lines",
            "What each layer has to gain",
            "Block",
            "Share, %",
            [
                Line(kind, kind, [Point(at, share.get((kind, block), 0.0)) for at, block in enumerate(blocks)])
                for kind in kinds
            ],
        ),
        notes=(
            "The share of a layer is that of its gradient's squares, after the new head was trained for some steps.",
        ),
        rows=[dataclasses.asdict(layer) for layer in layers],
    )


def _chosen(recipe: Recipe, layers: Sequence[Sensitivity], ranks: Ranks) -> Recipe:
    entries = technique_of(layers, ranks, like=low_rank(recipe))
    return recipe.model_copy(update={"technique": TechniqueSpec.parse(entries)})


def _subset(recipe: Recipe, layers: Sequence[Sensitivity], ranks: Ranks | None) -> Finding:
    adapter = prepare(recipe).adapter
    title = "4 · Subset selection"
    answer = f"{numbers.count(adapter.trainable)} of {numbers.count(adapter.total)} parameters are trained."
    if ranks is None:
        titles = " + ".join(method.title for method in adapter.methods)
        return Finding(title, f"{answer} {titles} is the recipe's.", (), (), None, (), ())
    trained = [layer for layer in layers if ranks.get(layer.place)]
    frozen = [layer.place for layer in layers if not ranks.get(layer.place)]
    return Finding(
        title=title,
        answer=f"{answer} {len(trained)} of {len(layers)} layers get a low-rank update, and {len(frozen)} stay frozen.",
        headings=("Trained", "Rank", "Parameters"),
        table=[
            (layer.place, str(ranks[layer.place]), numbers.count(ranks[layer.place] * layer.size)) for layer in trained
        ],
        chart=None,
        notes=(f"Frozen: {', '.join(frozen)}.",) if frozen else (),
        rows=[{"place": layer.place, "rank": ranks.get(layer.place, 0)} for layer in layers],
    )


def _against_full(recipe: Recipe) -> Recipe:
    full = TechniqueSpec.parse("full")
    return recipe.model_copy(update={"compare": (full, recipe.technique)})
