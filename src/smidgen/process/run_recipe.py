"""What the recipes of all training runs have in common: how one is trained, read, kept, and told from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    ValidationError,
    model_validator,
)

from smidgen import __version__
from smidgen.errors import UserError
from smidgen.files import sampled, write_text
from smidgen.process.corpus import text_hash
from smidgen.process.fields import Count, Positive, Seed, recipe_folder
from smidgen.process.overrides import override
from smidgen.process.problems import explain, refuse, shown
from smidgen.process.strict_yaml import dump, parse
from smidgen.process.technique import TechniqueSpec

Precision = Literal["fp32", "bf16", "int8"]
R = TypeVar("R", bound="RunRecipe")

MARK = "# Written by smidgen, with every field spelled out."
"""The first line of a recipe that is kept with a run's results."""

NOT_IN_RESULT = {"output", "compare", "seeds", "study", "choose", "identify", "refine", "pretrain"}
NOT_IN_TRAINING_RESULT = {"tracker", "checkpoint_minutes", "checkpoint_steps"}

Technique = Annotated[
    TechniqueSpec,
    PlainValidator(TechniqueSpec.parse),
    AfterValidator(lambda spec, info: spec.anchored(recipe_folder(info))),
    PlainSerializer(lambda spec: spec.written(), return_type=Any),
]


class Section(BaseModel):
    """A part of a recipe: it has no field but its own, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingConfig(Section):
    """How one adapter is trained; the same for every technique of a comparison.

    Attributes:
        epochs: passes over the training rows.
        max_steps: where to stop, if the epochs do not end before.
        batch_size: rows a step, over all processes.
        micro_batch_size: rows at once in one process; the gradients of a step are summed. None: its share of the batch.
        micro_batch_tokens: tokens at once in one process, padding included, in training and evaluation: the rows of a
            step are put together by length, as many as fit; virtual tokens do not count. A row that is longer is alone.
            None: any number.
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
        compile: whether each block is compiled by torch.compile, which takes a minute or more before the first step.
        precision: number format of the frozen weights and of the activations; "int8": the frozen weights of linear
            layers in 8 bits, and all else in fp32.
        frozen_states: how states below the first thing that learns are kept, where they are the same in every epoch:
            "exact"; "bf16", rounded, in half of the place; or "off".
        frozen_dropout: whether the blocks below it drop out while the rest is trained; if not, states can be kept.
        tracker: where losses and scores are sent as well; None: nowhere.
    """

    epochs: Count = 3
    max_steps: Count | None = None
    batch_size: Count = 32
    micro_batch_size: Count | None = None
    micro_batch_tokens: Count | None = None
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
    compile: StrictBool = False
    precision: Precision = "fp32"
    frozen_states: Literal["exact", "bf16", "off"] = "exact"
    frozen_dropout: StrictBool = True
    tracker: Literal["tensorboard", "mlflow", "wandb"] | None = None

    @property
    def rows_at_once(self) -> int:
        """What evaluation may take of the memory: no more rows than training."""
        return min(32, self.micro_batch_size or self.batch_size)

    @model_validator(mode="after")
    def _agrees(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is above batch_size={self.batch_size}, and is a part of it."
            )
        return self


class RunRecipe(Section):
    """What every recipe of a training run has.

    Attributes:
        command: the one that runs it.
        texts_field: which field the `texts` are of.
        technique: what is trained.
        training: how.
        output: the folder of the results.
    """

    command: ClassVar[str]
    texts_field: ClassVar[str]
    if TYPE_CHECKING:  # each kind of recipe has these fields at their place in its file
        technique: TechniqueSpec
        training: TrainingConfig
        output: str

    @property
    def metric(self) -> str:
        """Which of its scores the run is judged by."""
        raise NotImplementedError

    @property
    def texts(self) -> tuple[str, ...]:
        """Sources of running text that decide about the result, beside the rows; none, usually."""
        return ()

    def text_hash(self) -> str | None:
        """SHA-256 of the texts as they are now; None where there are none.

        Raises:
            UserError: one of them is not there.
        """
        return text_hash(self.texts, field=self.texts_field) if self.texts else None

    def _refuse_head_rate(self, *others: TechniqueSpec) -> None:
        """Raise a ValueError if a rate is given for the head of a task that has none, here or in other entries."""
        given = [self.training.head_learning_rate, *(spec.head_learning_rate for spec in (self.technique, *others))]
        if any(rate is not None for rate in given):
            raise ValueError(
                "head_learning_rate is that of a task's head, and what writes text has none: learning_rate is for all."
            )

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

    def changes(self, earlier: RunRecipe) -> list[str]:
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
        if isinstance(fields["model"], str) and Path(fields["model"]).is_dir():
            fields["weights"] = sampled(Path(fields["model"]))
        return fields | {"technique": self.technique.resolved(), "smidgen": __version__}


def refuse_own(path: Path) -> None:
    """Raise a UserError if a user's own recipe is where a run's is to be written."""
    if path.exists() and not _read(path).startswith(MARK):
        raise UserError(
            f"output={str(path.parent)!r} holds a {path.name} of your own, which would be replaced. Give another "
            "output."
        )


def read_recipe(
    kind: type[R], path: str | Path, overrides: Sequence[str], defaults: Callable[[dict[str, Any]], dict[str, Any]]
) -> R:
    """Reads and checks a recipe.

    Args:
        kind: of recipe.
        path: the YAML file. Relative paths in it are relative to its folder; `output` is runs/<its name> by default.
        overrides: such as "training.epochs=5", as if it were written in the file; later ones win.
        defaults: of what an override may change a part of, for the fields of the file.

    Raises:
        UserError: the file or an override can't be read, or fields are unknown, missing or wrong; one line for each.
    """
    path = Path(path)
    fields = parse(_read(path), str(path))
    if not isinstance(fields, dict):
        held = "is empty" if fields is None else f"holds {shown(fields)}, not fields"
        raise UserError(f"{path} {held}. A recipe starts with lines such as `model: embedded:minilm`.")
    fields.setdefault("output", f"runs/{path.stem}")
    for assignment in overrides:
        override(fields, assignment, defaults(fields))
    try:
        return kind.model_validate(fields, context={"folder": path.parent.absolute()})
    except ValidationError as error:
        raise refuse(str(path), explain(error, kind)) from error


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
