"""compare.json with a type for every value; whatever is missing there is None here, and never an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class _Record(BaseModel):
    """A mapping in which anything may be missing: None, NaN and infinity are as if they were not there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_missing(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = {key: _known(item) if isinstance(item, list | tuple) else item for key, item in value.items()}
        return {key: item for key, item in known.items() if not _is_missing(item)}


def _known(items: list[Any] | tuple[Any, ...]) -> list[Any]:
    return [item for item in items if not _is_missing(item)]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


class Point(_Record):
    """One point of a learning curve; `seconds` is the training time until then, without evaluation."""

    epoch: float | None = None
    seconds: float | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_score: float | None = None


class ClassScore(_Record):
    """How well one class is recognized; all but `support`, its rows in the test set, are shares."""

    label: str = ""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    support: int | None = None

    @property
    def ease(self) -> float:
        """What the classes are sorted by, the hardest first: F1, and after all of them where it is missing."""
        return 2.0 if self.f1 is None else self.f1


class Technique(_Record):
    """What one technique scored and cost; `confusion[i][j]` counts the rows of class i taken for class j."""

    name: str = ""
    title: str = ""
    summary: str = ""
    status: str = "done"
    error: str | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    scores: tuple[float, ...] = ()
    macro_f1: float | None = None
    trained: int | None = None
    share: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    disk_bytes: float | None = None
    curve: tuple[Point, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    per_class: tuple[ClassScore, ...] = ()

    @property
    def done(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "done"


class Model(_Record):
    """The pretrained model."""

    id: str = ""
    parameters: int | None = None


class Data(_Record):
    """The data: rows in each split, the names of the classes, and what is worth knowing about them."""

    name: str = ""
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Comparison(_Record):
    """All techniques of a recipe on the same data; `recommended` names the one that the advice is about."""

    title: str = "Comparison"
    created: str = ""
    command: str = ""
    recipe: str = ""
    task: str = ""
    metric: str = "score"
    model: Model = Model()
    data: Data = Data()
    baseline: str | None = None
    recommended: str | None = None
    advice: str = ""
    seeds: tuple[int, ...] = ()
    environment: dict[str, Any] = {}
    techniques: tuple[Technique, ...] = ()
