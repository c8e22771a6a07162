"""The kinds of value that a recipe's fields hold, each checked where it enters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StrictFloat, StrictInt, StrictStr, ValidationInfo

from smidgen.process.amounts import Unit, amount


def source_path(value: str, info: ValidationInfo) -> str:
    """A file's path is relative to the recipe's folder; embedded:... and hub:... name no file."""
    return value if value.startswith(("embedded:", "hub:")) else anchored(value, info)


def model_name(value: str, info: ValidationInfo) -> str:
    """A folder, if there is one of that name beside the recipe or it is written as a path; otherwise a hub id."""
    path = anchored(value, info)
    written_as_path = value.startswith(("/", "./", "../", "~"))
    return path if written_as_path or (not value.startswith("embedded:") and Path(path).is_dir()) else value


def anchored(value: str, info: ValidationInfo) -> str:
    """A path that is relative to the recipe's folder, whole."""
    # not Path.expanduser, which fails on a ~user that there is not
    own = os.path.expanduser(value)  # noqa: PTH111
    return os.path.normpath(recipe_folder(info) / own)


def recipe_folder(info: ValidationInfo) -> Path:
    """The recipe's; the working folder, if it is made in Python."""
    return Path((info.context or {}).get("folder", ""))


def filled(value: str) -> str:
    """Not empty."""
    if not value.strip():
        raise ValueError("is empty.")
    return value


def distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    """Each once, and one at least."""
    if not values or len(set(values)) < len(values):
        raise ValueError("must be a list of different seeds, such as [0, 1, 2].")
    return values


def several(value: object) -> object:
    """One source may stand by itself."""
    return [value] if isinstance(value, str) else value


def some(values: tuple[str, ...]) -> tuple[str, ...]:
    """One at least."""
    if not values:
        raise ValueError("names no file.")
    return values


def ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    """Each once, the smallest first."""
    if list(values) != sorted(set(values)):
        raise ValueError("must be a list of ascending numbers, such as [16, 64, 256].")
    return values


def plain(name: str) -> str:
    """A name that may be a folder's."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("must be a name of letters, digits, dots, dashes and underscores.")
    return name


def counted(unit: Unit, example: str) -> Callable[[object], object]:
    """Reads text as an amount of a unit, such as 600k; a number stays as it is."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            found = amount(value)
        except ValueError:
            found = None
        if found is None or found.unit != unit:
            raise ValueError(f"must be {unit}, such as {example}.")
        return round(found.value)

    return read


def plain_number(value: object) -> object:
    """Text; a whole number may stand without quotes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def budget(value: str) -> str:
    """Text that says an amount."""
    amount(value)
    return value


Text = Annotated[StrictStr, AfterValidator(filled)]
Source = Annotated[Text, AfterValidator(source_path)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(several), AfterValidator(some)]
ModelName = Annotated[Text, AfterValidator(model_name)]
OutputFolder = Annotated[Text, AfterValidator(anchored)]
Count = Annotated[StrictInt, Field(ge=1)]
Numbers = Annotated[Count, BeforeValidator(counted("numbers", "600000 or 600k"))]
Bytes = Annotated[Count, BeforeValidator(counted("bytes", "2000000000 or 2GB"))]
Budget = Annotated[StrictStr, BeforeValidator(plain_number), AfterValidator(budget)]
Sizes = Annotated[tuple[Count, ...], AfterValidator(ascending)]
Name = Annotated[StrictStr, AfterValidator(plain)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[StrictFloat, Field(gt=0, lt=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Seed, ...], AfterValidator(distinct)]
