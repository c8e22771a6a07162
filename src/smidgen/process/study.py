"""A study of a recipe: one of the five promises measured for its model and data, and the page of all that were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.errors import UserError
from smidgen.process import finding
from smidgen.process.data import load_data
from smidgen.process.finding import Finding
from smidgen.process.only_one import only_one
from smidgen.process.recipe import Recipe
from smidgen.process.runs import check_can_begin
from smidgen.process.studies import STUDIES
from smidgen.process.trainer import Tell, Trainer
from smidgen.report.findings import write_findings


def study(
    recipe: Recipe, promise: str, *, command: str, at_once: int = 1, tell: Tell = lambda line: None
) -> tuple[Finding, dict[str, str]]:
    """Measure a promise, and write study/PROMISE.json and study.html into the recipe's output.

    Runs that are finished are kept, those of `smidgen compare` among them.

    Args:
        recipe: its `compare` lists the techniques, its `seeds` the seeds, its `study` what is varied.
        promise: a name of `STUDIES`.
        command: how a person would run it again.
        at_once: how many runs share the machine.
        tell: hears of each run that ended.

    Returns:
        What was found, and what went wrong with runs that failed, by their folders.

    Raises:
        UserError: the data or the recipe cannot be used, or another process studies this recipe.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    check_can_begin(recipe)
    output = Path(recipe.output)
    with only_one(output):
        data = load_data(recipe.data, recipe.task)
        trainer = Trainer(recipe, command=command, at_once=at_once, tell=tell)
        found = STUDIES[promise](recipe, data, trainer)
        about = finding.about(recipe, command, trainer.failures)
        finding.write(found, about, output / "study" / f"{promise}.json")
        write_findings(_all_of(output), recipe, output / "study.html", what="What the promises are worth")
    return found, trainer.failures


def _all_of(output: Path) -> Mapping[str, tuple[Finding, dict[str, Any]]]:
    """What was found so far, by promise; what another version wrote is passed over."""
    found: dict[str, tuple[Finding, dict[str, Any]]] = {}
    for promise in STUDIES:
        path = output / "study" / f"{promise}.json"
        if path.is_file():
            try:
                found[promise] = finding.read(path)
            except UserError:
                continue
    return found
