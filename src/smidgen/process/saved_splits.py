"""The splits of a recipe as files, with a recipe that reads them, so that they stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.data import Example, TaskData
from smidgen.process.inspection import SPLITS
from smidgen.process.recipe import TARGETS, Recipe

SOURCE = "source.json"


def save_splits(recipe: Recipe, whole: TaskData, folder: Path) -> Path:
    """Write train.jsonl, validation.jsonl, test.jsonl, recipe.yaml, and source.json, which says of what they are.

    Args:
        recipe: of the data.
        whole: its rows, of which none are left out; `data.rows` are drawn when the recipe that is written is read.
        folder: a new one.

    Returns:
        The recipe's path.

    Raises:
        UserError: there is something, or the disk is full.
    """
    check_new(folder)
    column = TARGETS[recipe.task]
    with files.new_folder(folder) as new:
        for split in SPLITS:
            rows = [{"text": row.text, column: _target(row, whole.labels)} for row in getattr(whole, split)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_text(new / f"{split}.jsonl", lines)
        paths = {split: f"{split}.jsonl" for split in SPLITS}  # beside the recipe, wherever the folder is moved
        data = recipe.data.model_copy(update={**paths, "text": "text", column: column, "group": None})
        files.write_text(new / "recipe.yaml", recipe.model_copy(update={"data": data, "output": "run"}).written())
        files.write_json(new / SOURCE, _source(recipe, whole))
    return folder / "recipe.yaml"


def are_of(folder: Path, recipe: Recipe, whole: TaskData) -> bool:
    """Whether the splits in a folder were made of these rows."""
    return (folder / SOURCE).is_file() and files.read_json(folder / SOURCE) == _source(recipe, whole)


def _source(recipe: Recipe, whole: TaskData) -> dict[str, Any]:
    return {"data": recipe.data.model_dump(mode="json"), "rows": whole.fingerprint()}


def check_new(folder: Path) -> None:
    """Raise a UserError if something is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--save {folder} is there already, and what is in it would be lost. Name a new folder.")


def _target(row: Example, labels: tuple[str, ...]) -> Any:
    if row.label is not None:
        return labels[row.label]
    return row.answer if row.spans is None else [span._asdict() for span in row.spans]
