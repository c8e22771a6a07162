"""A stopped run, whole: everything that the rest of the run depends on, as JSON and safetensors.

The order of the data and the dropout of a step are functions of the seed and of where the run is, so that its
progress says all about them. What is left are the trained weights, the best ones so far, the optimizer's state and
the numbers that were gathered.

`checkpoint.json` names the file of the tensors and its hash. A new checkpoint's tensors are written beside the old
ones; replacing `checkpoint.json`, which happens at once or not at all, makes them count.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smidgen import files
from smidgen.errors import UserError
from smidgen.process.run_recipe import RunRecipe

FORMAT = 1
DESCRIPTION = "checkpoint.json"
PARTS = ("weights", "best", "moments")
_FIELDS = {"format", "recipe", "data", "progress", "tensors", "tensors_sha256", "sha256"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        progress: where the run is and what it has gathered; plain JSON.
        weights: the trained parameters.
        best: those of the best epoch so far; empty before the first evaluation.
        moments: the optimizer's state, PARAMETER/MOMENT.
    """

    progress: dict[str, Any]
    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def exists(folder: Path) -> bool:
    """Whether a checkpoint was written to `folder`, in full."""
    return (folder / DESCRIPTION).is_file()


def save(folder: Path, checkpoint: Checkpoint, recipe: RunRecipe, data: str) -> None:
    """Write the checkpoint; the one before stays whole until this one is.

    Args:
        folder: where; it holds one checkpoint and nothing else.
        checkpoint: what to write, with a `step` in its progress.
        recipe: the run's.
        data: the fingerprint of the run's rows.

    Raises:
        UserError: the disk is full.
    """
    tensors = {
        f"{part}|{name}": tensor.detach().to("cpu").contiguous()
        for part in PARTS
        for name, tensor in getattr(checkpoint, part).items()
    }
    unique = secrets.token_hex(4)  # a second save at one step must not write over the first
    path = folder / f"step-{checkpoint.progress['step']}-{unique}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    _write(tensors, path)
    description = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "data": data,
        "progress": checkpoint.progress,
        "tensors": path.name,
        "tensors_sha256": files.sha256(path),
    }
    files.write_json(folder / DESCRIPTION, description | {"sha256": _digest(description)})
    for other in folder.iterdir():
        if other.name not in (path.name, DESCRIPTION):
            other.unlink()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        if not files.is_full(error):
            raise
        raise UserError(
            f"No space is left on the disk for {path}: it needs {needed / 1e6:,.1f} MB. "
            + (
                "The checkpoint before it is whole. Free some, and train with --resume."
                if exists(path.parent)
                else "Nothing was saved. Free some and train again, or give another output."
            )
        ) from error


def load(folder: Path, recipe: RunRecipe, data: str) -> Checkpoint:
    """Read the checkpoint in `folder`.

    Raises:
        UserError: there is none, it was damaged, or the recipe or the rows have changed since.
    """
    if not exists(folder):
        raise UserError(f"There is no checkpoint to resume in {folder.parent}. Train without --resume.")
    description = files.read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT or description.keys() != _FIELDS:
        raise UserError(f"{folder / DESCRIPTION} is not a checkpoint that this smidgen reads. Remove {folder}.")
    digest = description.pop("sha256")
    if digest != _digest(description):
        raise UserError(f"{folder / DESCRIPTION} was changed after it was written (its SHA-256 differs).")
    if changes := recipe.changes(type(recipe).model_validate(description["recipe"])):
        raise UserError(
            f"The recipe has changed since {folder} was written, so that resuming would mix two runs: "
            f"{'; '.join(changes)}. Set it back, or give another output."
        )
    if description["data"] != data:
        raise UserError(f"The data have changed since {folder} was written. Bring them back, or give another output.")
    path = folder / Path(description["tensors"]).name
    if not path.is_file() or files.sha256(path) != description["tensors_sha256"]:
        raise UserError(
            f"{path} is missing, or was changed or cut short after it was written. Remove {folder}, and train again."
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in load_file(path).items():
        part, _, name = key.partition("|")
        parts[part][name] = tensor
    return Checkpoint(description["progress"], **parts)


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
