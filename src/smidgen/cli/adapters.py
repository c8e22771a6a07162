"""What is done with a trained adapter, and the list of techniques."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.shared import AsJson, RunFolder, check_picture, say, say_json
from smidgen.errors import UserError


def merge(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
) -> None:
    """Write the model with its adapter merged into the weights, as a plain folder that transformers loads.

    Example: `smidgen merge runs/recipe merged`
    """
    from smidgen.process.merge import merge as write_merged
    from smidgen.process.opening import reopen

    write_merged(reopen(run, precision="fp32"), output)
    say(f"The merged model is in {output}")


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
    from smidgen.process.opening import reopen

    lost = save_peft(reopen(run).adapter, output, rank=rank)
    say(f"The adapter is in {output}, as peft has it" + (f"; {lost:.1%} of its change is lost." if lost else "."))


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
    from smidgen.process.opening import reopen
    from smidgen.report.explained import as_picture, as_text

    check_picture(picture)
    job = reopen(run)
    found = explained(job.adapter, job.tokenizer, most=most)
    if not found:
        raise UserError(f"What {job.adapter.methods[0].title} has learned has no words, spectrum, scales or gates.")
    if picture is not None:
        write_text(picture, as_picture(found, f"What {job.adapter.name} has learned"))
    if as_json:
        say_json([vars(explanation) for explanation in found])
    else:
        say(as_text(found))


def methods(as_json: AsJson = False) -> None:
    """List the techniques: what they are, where they were published, and their options with the defaults.

    Example: `smidgen methods --json`
    """
    from smidgen.report.terminal import methods_json, methods_table

    if as_json:
        say_json(methods_json())
    else:
        say(methods_table())
