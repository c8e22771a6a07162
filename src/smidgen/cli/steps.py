"""The steps of one recipe: data, identification, plan, pre-training, training, evaluation, prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.shared import (
    AsJson,
    Quiet,
    RecipeFile,
    Resume,
    RunFolder,
    Set,
    as_json_text,
    changes,
    check_picture,
    is_first,
    say,
    say_json,
    tell,
)
from smidgen.errors import UserError


def data(
    recipe: RecipeFile,
    set_: Set = None,
    save: Annotated[Path | None, typer.Option(help="A folder for the splits as files, and a recipe of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at a recipe's data before training: repeated and shared texts, doubtful labels, lengths, what looks wrong.

    Writes the page data.html into the recipe's output folder.

    Examples: `smidgen data recipe.yaml`, `smidgen data recipe.yaml --save fixed`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.inspection import inspect_data
    from smidgen.process.opening import prepare
    from smidgen.process.recipe import load_recipe
    from smidgen.process.saved_splits import check_new, save_splits
    from smidgen.report.page import write_data_page
    from smidgen.report.terminal import inspection_lines

    if save is not None:
        check_new(save)
    loaded = load_recipe(recipe, set_ or [])
    job = prepare(loaded.undrawn)
    found = inspect_data(job)
    page = Path(loaded.output) / "data.html"
    write_data_page(found, loaded, command_line("data", str(recipe), *changes(set_)), page)
    saved = None if save is None else save_splits(loaded, job.data, save)
    if as_json:
        say_json(dataclasses.asdict(found))
        return
    say(*inspection_lines(found), f"\nThe page is {page}")
    if saved is not None:
        say(f"The splits are in {saved.parent}; go on with: smidgen plan {saved}")


def identify(
    recipe: RecipeFile,
    set_: Set = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Numbers to train, such as 100k or 1.5M, their bytes, as 400kB, or training time, as 10min."),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="A recipe with the ranks that the budget buys.")] = None,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw the model in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers have something to gain on a recipe's data, and the ranks that a budget buys there.

    The model's new head is trained for some steps; then the gradient of every linear layer is looked at.

    Examples: `smidgen identify recipe.yaml`, `smidgen identify recipe.yaml --budget 100k --write chosen.yaml`
    """
    from smidgen.files import write_text
    from smidgen.process.identification import allotted, low_rank, technique_of
    from smidgen.process.identification import identify as identified
    from smidgen.process.recipe import load_recipe
    from smidgen.process.technique import TechniqueSpec
    from smidgen.report.sensitivity import as_picture, as_table

    check_picture(picture)
    loaded = load_recipe(recipe, [*(set_ or []), *([] if budget is None else [f"identify.budget={budget}"])])
    budget = loaded.identify.budget
    if write is not None and (budget is None or write.exists()):
        raise UserError(f"--write {write} " + ("is there already." if budget else "needs a --budget."))
    found = identified(loaded)
    ranks = None if budget is None else allotted(found, loaded, budget)
    if picture is not None:
        write_text(picture, as_picture(found, ranks, f"Where {loaded.model} has something to gain"))
    entries = None if ranks is None else technique_of(found, ranks, like=low_rank(loaded))
    if write is not None and entries is not None:
        own = {"technique": TechniqueSpec.parse(entries), "output": str(Path(loaded.output) / write.stem)}
        loaded.model_copy(update=own).save(write)
    if as_json:
        say_json({"layers": [dataclasses.asdict(layer) for layer in found], "ranks": ranks, "technique": entries})
        return
    say(as_table(found, ranks))
    if ranks is not None:
        trained = sum(ranks[layer.place] * layer.size for layer in found)
        say(f"\n{trained:,} numbers trained with a budget of {budget}, beside the head")
        if low_rank(loaded) is None:
            say(f"They are LoRA's: {loaded.technique.name}, which the recipe trains, has no part in them.")
    if write is not None:
        say(f"The recipe is {write}; go on with: smidgen train {write}")


def plan(recipe: RecipeFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Show what would be trained and what it would cost, before anything runs.

    Example: `smidgen plan recipe.yaml --set technique=houlsby`
    """
    from smidgen.process.opening import prepare
    from smidgen.process.recipe import load_recipe

    job = prepare(load_recipe(recipe, set_ or []))
    planned = job.plan()
    if as_json:
        say_json(planned.as_json())
        return
    from smidgen.report.terminal import plan_lines

    say(*job.notes, *plan_lines(planned))


def train(
    recipe: RecipeFile,
    set_: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one technique, keep its best epoch, and score it on the test split.

    Ctrl-C saves a checkpoint; the same command with --resume goes on to the same weights, bit for bit.

    Examples: `smidgen train recipe.yaml`, `smidgen train recipe.yaml --set technique=lora --set training.epochs=5`
    """
    from smidgen.process.opening import prepare
    from smidgen.process.recipe import load_recipe
    from smidgen.process.run import check_start, run
    from smidgen.report.terminal import plan_lines, score_lines

    loaded = load_recipe(recipe, set_ or [])
    check_start(loaded, resume=resume)
    job = prepare(loaded)
    if not (quiet or as_json):
        say(*job.notes, *plan_lines(job.plan()))
    metrics = run(job, resume=resume, quiet=quiet or as_json)
    if as_json:
        say_json(metrics)
        return
    if len(metrics["curve"]) > 1:
        say(f"Kept: epoch {metrics['best_epoch']} of {len(metrics['curve'])}, the best on the validation rows")
    if metrics["probe"] is not None:
        before, after = metrics["probe"]["before"], metrics["probe"]["after"]
        say(f"Loss of the probe {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.1f} %)")
    say(*score_lines(metrics["test"] or {}), f"The adapter is in {Path(job.recipe.output) / 'adapter'}")


def pretrain(
    recipe: RecipeFile,
    set_: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a language model on text files, from new weights or going on from a checkpoint, and write its folder.

    Ctrl-C saves a checkpoint; the same command with --resume goes on to the same weights, bit for bit.

    Example: `smidgen pretrain pretrain.yaml`
    """
    from smidgen.process.pretrain import pretrain as pretrained
    from smidgen.process.pretrain_recipe import load_pretrain_recipe
    from smidgen.report.numbers import short
    from smidgen.report.terminal import pretraining_lines

    loaded, quiet = load_pretrain_recipe(recipe, set_ or []), quiet or as_json
    metrics = pretrained(
        loaded,
        resume=resume,
        quiet=quiet,
        tell=lambda job: None if quiet else say(*pretraining_lines(job)),
    )
    if as_json:
        say_json(metrics)
        return
    before, after = (short(metrics[when]["perplexity"]) for when in ("before", "after"))
    say(f"Perplexity on the validation text {before} before, {after} after {metrics['tokens']:,} tokens")
    say(f"The model is in {Path(loaded.output) / 'model'}")


def evaluate(
    run: RunFolder,
    data: Annotated[str | None, typer.Option(help="Another labelled file; default: the run's own test split.")] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, separated by commas.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="A folder of the harness's task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task of the harness.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained adapter: every class and the confusion matrix, F1 of spans, or loss and exact match.

    Examples: `smidgen evaluate runs/recipe`, `smidgen evaluate runs/recipe --data new.csv --json`,
    `smidgen evaluate runs/answers --harness hellaswag,arc_easy --limit 200`
    """
    from smidgen.process.opening import reopen
    from smidgen.report.terminal import score_lines

    if harness is None and (tasks is not None or limit is not None):
        raise UserError("--tasks and --limit are for --harness, which names the harness's tasks.")
    if harness is not None:
        from smidgen.process.harness import harness_scores
        from smidgen.report.terminal import harness_table

        if data is not None:
            raise UserError("--data and --harness are two different tests: give one of them.")
        names = [name.strip() for name in harness.split(",") if name.strip()]
        found = harness_scores(reopen(run), names, folder=tasks, limit=limit)
        if as_json:
            say_json(dataclasses.asdict(score) for score in found)
        else:
            say(harness_table(found))
        return
    scores = reopen(run).evaluate(data, tell=tell)
    if as_json:
        say_json(scores)
        return
    say(*score_lines(scores))


def predict(
    run: RunFolder,
    rows: Annotated[str, typer.Argument(help="A file of texts, or - for lines on standard input.")] = "-",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a written answer is cut off.")] = 128,
) -> None:
    """Answer texts with a trained adapter, one JSON line each, in their order.

    A row that cannot be read gets an error in its place, and is counted at the end; so are texts and answers that were
    cut. The exit status stays 0.

    Examples: `smidgen predict runs/recipe new.csv > answers.jsonl`, `echo "my card" | smidgen predict runs/recipe`
    """
    from smidgen.process.opening import reopen

    for answer in reopen(run).predict(rows, batch_size=batch_size, max_new_tokens=max_new_tokens, tell=tell):
        if is_first():
            print(as_json_text(answer), flush=True)
