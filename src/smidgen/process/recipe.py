"""The recipe: one YAML file, checked in full before anything runs, that drives every step of the process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from smidgen import __version__
from smidgen.errors import UserError
from smidgen.files import write_text
from smidgen.process.overrides import override
from smidgen.process.problems import explain, refuse, shown
from smidgen.process.strict_yaml import dump, parse
from smidgen.process.technique import TechniqueSpec

Task = Literal["classification", "token-classification", "generation"]
Precision = Literal["fp32", "bf16"]

TARGETS: dict[Task, str] = {"classification": "label", "token-classification": "spans", "generation": "answer"}
"""The field of `data` that names the column of what is learned."""

MARK = "# Written by smidgen, with every field spelled out."
"""The first line of a recipe that is kept with a run's results."""

NOT_IN_RESULT = {"output", "compare", "seeds"}
NOT_IN_TRAINING_RESULT = {"tracker", "checkpoint_minutes", "checkpoint_steps"}


def _source(value: str, info: ValidationInfo) -> str:
    """A file's path is relative to the recipe's folder; embedded:... and hub:... name no file."""
    return value if value.startswith(("embedded:", "hub:")) else _anchored(value, info)


def _model(value: str, info: ValidationInfo) -> str:
    """A folder, if there is one of that name beside the recipe or it is written as a path; otherwise a hub id."""
    path = _anchored(value, info)
    written_as_path = value.startswith(("/", "./", "../", "~"))
    return path if written_as_path or (not value.startswith("embedded:") and Path(path).is_dir()) else value


def _anchored(value: str, info: ValidationInfo) -> str:
    # not Path.expanduser, which fails on a ~user that there is not
    own = os.path.expanduser(value)  # noqa: PTH111
    return os.path.normpath(_folder(info) / own)


def _folder(info: ValidationInfo) -> Path:
    """The recipe's; the working folder, if it is made in Python."""
    return Path((info.context or {}).get("folder", ""))


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty.")
    return value


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must be a list of different seeds, such as [0, 1, 2].")
    return values


Text = Annotated[StrictStr, AfterValidator(_filled)]
Source = Annotated[Text, AfterValidator(_source)]
ModelName = Annotated[Text, AfterValidator(_model)]
OutputFolder = Annotated[Text, AfterValidator(_anchored)]
Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[StrictFloat, Field(gt=0, lt=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Seed, ...], AfterValidator(_distinct)]
Technique = Annotated[
    TechniqueSpec,
    PlainValidator(TechniqueSpec.parse),
    AfterValidator(lambda spec, info: spec.anchored(_folder(info))),
    PlainSerializer(lambda spec: spec.written(), return_type=Any),
]


def _once_each(specs: tuple[TechniqueSpec, ...]) -> tuple[TechniqueSpec, ...]:
    slugs = [spec.slug for spec in specs]
    if not slugs:
        raise ValueError("holds no technique.")
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise ValueError(f"holds {twice[0]} twice.")
    return specs


COMPARED = (
    "full",
    "head",
    "lora",
    "houlsby",
    "pfeiffer",
    "parallel",
    "prefix-tuning",
    "prompt-tuning",
    "p-tuning",
)
"""What is compared unless the recipe says otherwise: the baselines, and each family of techniques."""


def _comparable(task: object) -> tuple[TechniqueSpec, ...]:
    """The default comparison; in generation there is no task head to train alone."""
    return tuple(TechniqueSpec.parse(name) for name in COMPARED if (task, name) != ("generation", "head"))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where the rows are and what their columns mean.

    Attributes:
        train: a .csv, .tsv, .jsonl or .parquet file, embedded:tweets, embedded:questions, or
            hub:OWNER/NAME[/CONFIG][@SPLIT].
        validation: the same; None: a part of the training rows is set aside.
        test: the same; None: a part of the training rows is set aside.
        validation_share: how much is set aside for validation, of all training rows.
        test_share: how much is set aside for the test, of all training rows.
        seed: of what is set aside; not `training.seed`, so that all runs of a comparison have the same test split.
        text: the column of the texts; in generation, of the prompts.
        label: the column of the classes (classification).
        spans: the column of the labelled spans (token classification): lists of {"start": 4, "end": 9, "label": "city"}
            in characters of the text, from `start` up to, not including, `end`.
        answer: the column of the answers (generation).
        template: how a text is written for the model; {text} stands for it, once.
        max_length: tokens of a row, answer included; None: the model's limit less the adapter's virtual tokens.
        bad_rows: whether a row that can't be used is an error or skipped and counted.
    """

    train: Source
    validation: Source | None = None
    test: Source | None = None
    validation_share: Share = 0.1
    test_share: Share = 0.1
    seed: Seed = 0
    text: Text = "text"
    label: Text = "label"
    spans: Text = "spans"
    answer: Text = "answer"
    template: Text = "{text}"
    max_length: Count | None = None
    bad_rows: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _agrees(self) -> DataConfig:
        aside = self.validation_share * (self.validation is None) + self.test_share * (self.test is None)
        if aside >= 1:
            raise ValueError(
                f"validation_share={self.validation_share} and test_share={self.test_share} leave no row to train on."
            )
        if self.template.count("{text}") != 1:
            raise ValueError(
                f"template={shown(self.template)} must hold {{text}} once, where the text of a row belongs, "
                'as in "Question: {text}\\nAnswer:".'
            )
        return self


class TrainingConfig(_Section):
    """How one adapter is trained; the same for every technique of a comparison.

    Attributes:
        epochs: passes over the training rows.
        max_steps: where to stop, if the epochs do not end before.
        batch_size: rows a step, over all processes.
        micro_batch_size: rows at once in one process; the gradients of a step are summed. None: its share of the batch.
        learning_rate: None: the technique's own default for the kind of model.
        head_learning_rate: None: the technique's own.
        weight_decay: AdamW's.
        warmup: share of the steps in which the learning rate rises to its full value.
        schedule: how it falls afterwards.
        clip: the largest norm of the gradient.
        seed: of the data's order, the new parameters and dropout.
        patience: epochs without improvement before the run stops; None: never.
        checkpoint_minutes: time between checkpoints for resuming; None: never by time.
        checkpoint_steps: steps between them; None: never by steps.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        precision: number format of the frozen weights and of the activations.
        tracker: where losses and scores are sent as well; None: nowhere.
    """

    epochs: Count = 3
    max_steps: Count | None = None
    batch_size: Count = 32
    micro_batch_size: Count | None = None
    learning_rate: Positive | None = None
    head_learning_rate: Positive | None = None
    weight_decay: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 0.0
    warmup: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: Positive = 1.0
    seed: Seed = 0
    patience: Count | None = None
    checkpoint_minutes: Positive | None = 5.0
    checkpoint_steps: Count | None = None
    gradient_checkpointing: StrictBool = False
    precision: Precision = "fp32"
    tracker: Literal["tensorboard", "mlflow", "wandb"] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is above batch_size={self.batch_size}, and is a part of it."
            )
        return self


class Recipe(_Section):
    """One model, one data set, one budget, and the techniques to train.

    Attributes:
        model: embedded:minilm, embedded:smollm2, a folder, or a hub id.
        task: what the model learns.
        data: where the rows are.
        technique: what `train` trains.
        compare: what `compare` compares; `COMPARED` by default, without `head` in generation.
        training: how each is trained.
        seeds: `compare` trains each technique once for each.
        output: the folder of the results.
    """

    model: ModelName
    task: Task = "classification"
    data: DataConfig
    technique: Technique = Field(default_factory=lambda: TechniqueSpec.parse("lora"))
    compare: Annotated[tuple[Technique, ...], AfterValidator(_once_each)] = Field(
        default_factory=lambda fields: _comparable(fields.get("task"))
    )
    training: TrainingConfig = TrainingConfig()
    seeds: Seeds = (0,)
    output: OutputFolder

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        for task, column in TARGETS.items():
            given = getattr(self.data, column)
            if task != self.task and given != DataConfig.model_fields[column].default:
                raise ValueError(
                    f"data.{column}={shown(given)} is a column of task={task}; that of task={self.task} is "
                    f"data.{TARGETS[self.task]}."
                )
        return self

    def written(self) -> str:
        """The recipe as YAML with every field spelled out and whole paths; `load_recipe` gives it back."""
        return dump(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Writes `written` to a file, atomically.

        Raises:
            UserError: a recipe is there that a user wrote.
        """
        refuse_own(path)
        write_text(path, f"{MARK}\n{self.written()}")

    def fingerprint(self) -> str:
        """SHA-256 of everything that changes the result of a training run; not of what the data files hold."""
        return hashlib.sha256(json.dumps(self._decisive(), sort_keys=True).encode()).hexdigest()

    def changes(self, earlier: Recipe) -> list[str]:
        """What makes the fingerprint differ from an earlier recipe's, such as "training.epochs was 3 and is 5"."""
        before, now = _flat(earlier._decisive()), _flat(self._decisive())
        return [
            f"{field} was {before.get(field, 'not there')} and is {now.get(field, 'not there')}"
            for field in {**before, **now}
            if before.get(field) != now.get(field)
        ]

    def _decisive(self) -> dict[str, Any]:
        fields = self.model_dump(mode="json", exclude={*NOT_IN_RESULT, "technique"})
        fields["training"] = {k: v for k, v in fields["training"].items() if k not in NOT_IN_TRAINING_RESULT}
        return fields | {"technique": self.technique.resolved(), "smidgen": __version__}


def refuse_own(path: Path) -> None:
    """Raise a UserError if a user's own recipe is where a run's is to be written."""
    if path.exists() and not _read(path).startswith(MARK):
        raise UserError(
            f"output={str(path.parent)!r} holds a {path.name} of your own, which the run's would replace. "
            "Give another output."
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file. Relative paths in it are relative to its folder; `output` is runs/<its name> by default.
        overrides: such as "training.epochs=5", as if it were written in the file; later ones win.

    Raises:
        UserError: the file or an override can't be read, or fields are unknown, missing or wrong; one line for each.
    """
    path = Path(path)
    fields = parse(_read(path), str(path))
    if not isinstance(fields, dict):
        held = "is empty" if fields is None else f"holds {shown(fields)}, not fields"
        raise UserError(f"{path} {held}. A recipe starts with lines such as `model: embedded:minilm`.")
    fields.setdefault("output", f"runs/{path.stem}")
    if overrides:
        comparable = [spec.written() for spec in _comparable(fields.get("task"))]
        for assignment in overrides:
            override(fields, assignment, {"technique": "lora", "compare": comparable})
    try:
        return Recipe.model_validate(fields, context={"folder": path.parent.absolute()})
    except ValidationError as error:
        raise refuse(str(path), explain(error, Recipe)) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(entry.name for pattern in ("*.yaml", "*.yml") for entry in path.parent.glob(pattern))
        there = f" Recipes in {path.parent}: {', '.join(near[:10])}." if near else ""
        raise UserError(f"There is no recipe {path}.{there}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Give the recipe's file, such as {path / 'recipe.yaml'}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None


def _flat(value: Any, path: str = "") -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {path: json.dumps(value)}
    return {
        field: text
        for key, inner in items
        for field, text in _flat(inner, f"{path}.{key}" if path else str(key)).items()
    }
