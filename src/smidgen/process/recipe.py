"""The recipe: one YAML file, checked in full before anything runs, that drives every step of the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, model_validator

from smidgen import manifest
from smidgen.process.fields import (
    Budget,
    Bytes,
    Count,
    ModelName,
    Name,
    Numbers,
    OutputFolder,
    Positive,
    Seed,
    Seeds,
    Share,
    Sizes,
    Source,
    Sources,
    Text,
)
from smidgen.process.pretrain_recipe import PretrainRecipe
from smidgen.process.problems import shown
from smidgen.process.run_recipe import RunRecipe, Section, Technique, TrainingConfig, read_recipe
from smidgen.process.technique import TechniqueSpec

Task = Literal["classification", "token-classification", "generation"]

TARGETS: dict[Task, str] = {"classification": "label", "token-classification": "spans", "generation": "answer"}
"""The field of `data` that names the column of what is learned."""

METRICS: dict[Task, str] = {"classification": "accuracy", "token-classification": "f1", "generation": "loss"}
"""Which of its scores a task is judged by."""


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


class DataConfig(Section):
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
        group: a column whose rows of the same value are never parted, such as a conversation or a person; None: there
            is none.
        template: how a text is written for the model; {text} stands for it, once.
        max_length: tokens of a row, answer included; None: the model's limit less the adapter's virtual tokens.
        rows: how many of the training rows are used, and of the validation rows at most; None: all. The test split and
            the labels stay whole.
        draw: which ones they are; those of fewer `rows` are among those of more.
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
    group: Text | None = None
    template: Text = "{text}"
    max_length: Count | None = None
    rows: Count | None = None
    draw: Seed = 0
    bad_rows: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _agrees(self) -> DataConfig:
        aside = self.validation_share * (self.validation is None) + self.test_share * (self.test is None)
        if aside >= 1:
            raise ValueError(
                f"validation_share={self.validation_share} and test_share={self.test_share} leave no row to train on."
            )
        targets = {"label": self.label, "answer": self.answer, "spans": self.spans}
        if same := [name for name, column in targets.items() if column == self.text]:
            raise ValueError(f"text and {same[0]} both name the column {shown(self.text)}; each has one of its own.")
        if self.template.count("{text}") != 1:
            raise ValueError(
                f"template={shown(self.template)} must hold {{text}} once, where the text of a row belongs, "
                'as in "Question: {text}\\nAnswer:".'
            )
        return self


class ProbeConfig(Section):
    """What is watched, and how much of it may be forgotten.

    Attributes:
        text: files, folders, patterns, or embedded:sotu: text of the kind that the model should go on to know.
        rise: how much the loss of its tokens may rise, as a part of what it was; an epoch beyond is not kept, and the
            training ends with it.
        blocks: how many blocks are scored.
        length: tokens of a block.
    """

    text: Sources
    rise: Positive = 0.05
    blocks: Count = 50
    length: Count = 128


Margin = Annotated[StrictFloat, Field(gt=0, le=0.2)]
"""A share of one, so that 1 is no point: larger ones would call everything the same."""


class StudyConfig(Section):
    """What the studies of a recipe vary.

    Attributes:
        sizes: training rows, ascending; all of them come after these.
        draws: how many times so many rows are drawn.
        steps: of training on few rows, unless all rows have fewer.
        margin: how far from full fine-tuning counts as the same: of a share such as accuracy itself, 0.01 a point; of a
            loss as a part of full fine-tuning's.
        tasks: other tasks by name, in the order in which they are learned: what is forgotten, and what carries over.
    """

    sizes: Sizes = (16, 64, 256, 1024)
    draws: Count = 5
    steps: Count = 300
    margin: Margin = 0.01
    tasks: dict[Name, DataConfig] = Field(default_factory=dict)


class ChooseConfig(Section):
    """What `choose` may spend, and what it looks for.

    Attributes:
        trained: the most parameters that may be trained, such as 600k, the head among them; None: any number.
        memory: the most bytes that a run may take at its peak, such as 2GB; None: any number.
        minutes: of training, of all trials together; None: as many as the trials take.
        trials: entries that are tried, most of them for a part of the steps.
        goal: "best", the best validation score; or "smallest", the fewest trained parameters within `study.margin` of
            it.
    """

    trained: Numbers | None = None
    memory: Bytes | None = None
    minutes: Positive | None = None
    trials: Count = 27
    goal: Literal["best", "smallest"] = "best"


class IdentifyConfig(Section):
    """What the trained subset may take.

    Attributes:
        budget: numbers to train, such as 100k or 1.5M, their bytes, as 400kB, or training time, as 10min; None:
            `identify` and `process` choose no subset.
    """

    budget: Budget | None = None


class RefineConfig(Section):
    """How long `refine` goes on.

    Attributes:
        rounds: changes that are tried, at most.
    """

    rounds: Count = 4


class Recipe(RunRecipe):
    """One model, one data set, one budget, and the techniques to train.

    Attributes:
        model: embedded:minilm, embedded:smollm2, a folder, or a hub id.
        task: what the model learns.
        data: where the rows are.
        technique: what `train` trains.
        start: the output folder of a run, or the folder of an adapter, from which training goes on; a head for other
            labels starts anew. None: a new adapter.
        compare: what `compare` compares; `COMPARED` by default, without `head` in generation.
        training: how each is trained.
        probe: text that the model should not forget, watched while it is trained; generation only. None: there is none.
        seeds: `compare` trains each technique once for each.
        study: what the studies vary.
        choose: the budget of a search, and its goal.
        identify: what the trained subset may take.
        refine: how many changes are tried.
        pretrain: the pre-training that makes `model`, which is in the folder `model` of its output; the first step of
            `process`. None: the model is there.
        score_test: whether the test split is scored at the end of a run.
        output: the folder of the results.
    """

    command: ClassVar = "train"
    texts_field: ClassVar = "probe.text"

    model: ModelName
    task: Task = "classification"
    data: DataConfig
    technique: Technique = Field(default_factory=lambda: TechniqueSpec.parse("lora"))
    start: OutputFolder | None = None
    compare: Annotated[tuple[Technique, ...], AfterValidator(_once_each)] = Field(
        default_factory=lambda fields: _comparable(fields.get("task"))
    )
    training: TrainingConfig = TrainingConfig()
    probe: ProbeConfig | None = None
    seeds: Seeds = (0,)
    study: StudyConfig = StudyConfig()
    choose: ChooseConfig = ChooseConfig()
    identify: IdentifyConfig = IdentifyConfig()
    refine: RefineConfig = RefineConfig()
    pretrain: PretrainRecipe | None = None
    score_test: StrictBool = True
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
        made = None if self.pretrain is None else str(Path(self.pretrain.output) / "model")
        if made is not None and self.model != made:
            raise ValueError(
                f"model={self.model!r} is not what pretrain makes, which is {made!r}; a path that is not there yet is "
                "written with ./ before it."
            )
        if self.task == "generation":
            self._refuse_head_rate(*self.compare)
        if self.probe is not None and self.task != "generation":
            raise ValueError(
                f"probe is text, which a model of task={self.task} has no words for; it is for generation."
            )
        return self

    @property
    def metric(self) -> str:
        """Which of its scores the task is judged by."""
        return METRICS[self.task]

    @property
    def texts(self) -> tuple[str, ...]:
        """Those of the probe."""
        return () if self.probe is None else self.probe.text

    @property
    def undrawn(self) -> Recipe:
        """The same with all rows of its data."""
        return self.model_copy(update={"data": self.data.model_copy(update={"rows": None})})

    @property
    def starting_folder(self) -> Path | None:
        """The folder of the adapter that training goes on from."""
        return None if self.start is None else manifest.folder_of(Path(self.start))

    def title_of(self, spec: TechniqueSpec) -> str:
        """A technique's name for people; its options too, if the recipe compares another entry of the same one."""
        titles = [method.title for method in spec.methods()]
        title = " + ".join(dict.fromkeys(titles))
        if len(titles) > len(set(titles)):  # the same at several ranks, as identify and refine choose them
            ranks = dict.fromkeys(str(getattr(method, "rank", "")) for method in spec.methods())
            title += f" of ranks {', '.join(ranks)}"
        twins = [other for other in self.compare if other.name == spec.name]
        return title if len(twins) < 2 else f"{title} ({spec.slug.removeprefix(spec.name).lstrip('-') or 'as it is'})"

    def _decisive(self) -> dict[str, Any]:
        start = self.starting_folder
        fields = super()._decisive()
        if start is not None and (start / manifest.FILE).is_file():  # the path says nothing about what is there
            fields["start"] = manifest.hash_of(start)
        return fields


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, as `read_recipe` does."""
    return read_recipe(
        Recipe,
        path,
        overrides,
        lambda fields: {"technique": "lora", "compare": [spec.written() for spec in _comparable(fields.get("task"))]},
    )
