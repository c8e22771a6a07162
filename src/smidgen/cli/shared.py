"""What the commands share: the program, its options, and how it speaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smidgen.errors import UserError

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


def check_picture(picture: Path | None) -> None:
    """Raise a UserError unless a picture's file is an SVG."""
    if picture is not None and picture.suffix.lower() != ".svg":
        raise UserError(f"--picture {picture} is drawn as SVG: give a name that ends in .svg.")


def refuse(failures: Mapping[str, str]) -> None:
    """Raise a UserError that names the runs that failed, if there are such; what they left is written."""
    if failures:
        raise UserError("\n".join(("What failed:", *(f"  {run}: {error}" for run, error in failures.items()))))


def sharing(at_once: int) -> list[str]:
    """The option --at-once as a person would type it."""
    return ["--at-once", str(at_once)] if at_once > 1 else []


def changes(set_: list[str] | None) -> list[str]:
    """The --set options as a person would type them."""
    return [word for change in set_ or [] for word in ("--set", change)]


def compared(recipe: Recipe, command: str, *, at_once: int = 1, as_json: bool) -> None:
    """Run a comparison with a live table, and say where the page is."""
    from smidgen.process.compare import compare as run
    from smidgen.report.terminal import live

    with contextlib.nullcontext() if as_json else live(console()) as watch:
        result = run(recipe, command=command, at_once=at_once, watch=watch)
    for note in result["data"]["notes"]:
        tell(note)
    if as_json:
        say_json(result)
    else:
        say("", result["advice"], f"\nThe page: {Path(recipe.output) / 'report.html'}")
    failed = [row["title"] for row in result["techniques"] if row["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(result['techniques'])} techniques failed: {', '.join(failed)}.")


def is_first() -> bool:
    """Whether this process prints: of several that train together, the first alone does."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """The terminal; silent in all but the first of several processes."""
    from rich.console import Console

    return Console(quiet=not is_first())


def say(*parts: RenderableType) -> None:
    """Print texts and tables as they are: a "[" in a label or a path is no markup."""
    from rich.table import Table

    terminal = console()
    for part in parts:
        terminal.print(part, markup=False, emoji=False, highlight=False, soft_wrap=not isinstance(part, Table))


def say_json(value: Mapping[str, Any] | Iterable[Any]) -> None:
    """Print JSON for a program to read."""
    if is_first():
        print(as_json_text(value if isinstance(value, dict) else list(value), indent=2))


def as_json_text(value: object, indent: int | None = None) -> str:
    """JSON in the letters that standard output takes; others are escaped, which means the same."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def tell(note: str) -> None:
    """Say what a user should know, beside the results."""
    if is_first():
        print(note, file=sys.stderr)
