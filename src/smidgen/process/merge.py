"""A finished run as a plain model: its adapter merged into the weights, in a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.job import Job
from smidgen.process.models import quietly


def merge(job: Job, output: Path) -> None:
    """Write the model with the adapter merged into it, and its tokenizer.

    Raises:
        UserError: the technique cannot be merged, or the folder cannot be written.
    """
    try:
        job.adapter.merge()
    except ValueError as error:
        raise UserError(str(error)) from error
    with quietly(), files.new_folder(output) as folder:
        job.model.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
