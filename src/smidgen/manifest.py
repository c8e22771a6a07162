"""`adapter.json`: what a saved adapter says about itself, each value of its own type and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, ValidationError

from smidgen import files
from smidgen.delta import Side, Site
from smidgen.errors import UserError

FORMAT: Final = 1
FILE = "adapter.json"
PEFT_FILE: Final = "adapter_config.json"
TENSORS: Final = "adapter.safetensors"
LONGEST_NAME = 64


def folder_of(path: Path) -> Path:
    """The folder of an adapter; the output of a run, which is none itself, stands for the adapter in it."""
    inside = path / "adapter"
    return inside if inside.is_dir() and not any((path / file).is_file() for file in (FILE, PEFT_FILE)) else path


def checked_name(name: str) -> str:
    """An adapter's name as it is: anything that can be read on one line; it is never a part of a path.

    Raises:
        ValueError: it is no such name.
    """
    if not (isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()):
        raise ValueError(
            f"name={name!r} is not an adapter's name: 1 to {LONGEST_NAME} characters that can be read on one line, "
            "with no space at either end."
        )
    return name


Name = Annotated[StrictStr, AfterValidator(checked_name)]
Digest = Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name appears twice")
    return names


Names = Annotated[list[StrictStr], AfterValidator(_unique)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Base(_Part):
    """The model that the adapter was trained on: where it came from, its class, and a hash of its weights."""

    id: str
    kind: str
    fingerprint: Digest


class SavedPlace(_Part):
    """A place by exact module name; `source` is the start of the sublayer that it ends."""

    name: str
    source: str | None
    side: Side
    site: Site


class Technique(_Part):
    """A technique with all its fields, and where its deltas are."""

    technique: str
    fields: dict[str, bool | int | float | str | None]
    places: list[SavedPlace]


class Manifest(_Part):
    """Everything in adapter.json.

    Attributes:
        format: of the folder.
        smidgen: the version that wrote it.
        name: the adapter's.
        base: the model that it belongs to.
        techniques: in the order in which they act.
        own: which of the model's own parameters are saved with it.
        head: which of those are the task head's.
        labels: the head's label names.
        metrics: scores that the writer wanted to keep.
        sha256: of each other file.
        digest: of everything else in this one.
    """

    format: Literal[1]
    smidgen: str
    name: Name
    base: Base
    techniques: Annotated[list[Technique], Field(min_length=1)]
    own: Names
    head: Names
    labels: Names | None
    metrics: dict[str, Any]
    sha256: dict[Literal["adapter.safetensors"], Digest]
    digest: Digest | None = None

    def write(self, folder: Path) -> None:
        """Write adapter.json into a folder."""
        fields = self.model_dump()
        text = json.dumps({**fields, "digest": digest_of(fields)}, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FILE).write_text(text + "\n", "utf-8")


def hash_of(folder: Path) -> str:
    """What tells a saved adapter from every other: its manifest's SHA-256, which covers its tensors'."""
    return files.sha256(folder / FILE)


def digest_of(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of all fields but the digest itself, whatever the file's layout."""
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """Read and check adapter.json of an adapter's folder.

    Raises:
        UserError: the folder is not an adapter's, or was damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. An adapter is the folder that `smidgen train` or Adapter.save wrote."
        )
    for name in (FILE, TENSORS):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a link; an adapter's files must lie in its folder.")
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; it is not an adapter, or was not written completely.")
    try:
        found = Manifest.model_validate(files.read_json(folder / FILE))
        if found.digest != digest_of(found.model_dump()):
            raise UserError(f"{folder / FILE} was changed after it was saved (its SHA-256 differs). Copy it again.")
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"{folder / FILE} is not one that this smidgen reads: {where}: {first['msg']}. It was changed after it was "
            "written, or by another version."
        ) from error
