"""The recipe of a pre-training: a model, new or not, the text that it reads, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from smidgen.process.fields import Count, ModelName, OutputFolder, Share, Sources, Text, filled, model_name
from smidgen.process.problems import Problems, explain, shown
from smidgen.process.run_recipe import RunRecipe, Section, Technique, TrainingConfig, read_recipe
from smidgen.process.technique import TechniqueSpec
from smidgen.process.vocabulary import Objective


class NewModel(Section):
    """A model that starts from random weights.

    Attributes:
        type: of its configuration in transformers: bert, roberta, modernbert, llama, gpt2, ...
        config: the fields of the configuration, such as hidden_size; the vocabulary's size and the special tokens are
            the tokenizer's.
    """

    type: Text
    config: dict[StrictStr, Any] = Field(default_factory=dict)


def _start(value: object, info: ValidationInfo) -> str | NewModel:
    """A model's name, or the fields of a new one."""
    if isinstance(value, dict):
        try:
            return NewModel.model_validate(value)
        except ValidationError as error:
            raise Problems(explain(error, NewModel)) from error
    if isinstance(value, NewModel):
        return value
    if not isinstance(value, str):
        raise ValueError("must be the name of a model, or a new one: {type: bert, config: {hidden_size: 128}}.")
    return model_name(filled(value), info)


def _written(model: str | NewModel) -> Any:
    return model if isinstance(model, str) else model.model_dump(mode="json")


class TokenizerConfig(Section):
    """The tokenizer of a new model.

    Attributes:
        of: a model whose tokenizer it takes; None: it is trained on the corpus.
        vocabulary: how many tokens it has, if it is trained.
        lowercase: whether capitals are made small, if it is trained.
    """

    of: ModelName | None = None
    vocabulary: Count = 8000
    lowercase: StrictBool = False

    @model_validator(mode="after")
    def _agrees(self) -> TokenizerConfig:
        if self.of is not None and self.model_fields_set - {"of"}:
            raise ValueError(f"of={shown(self.of)} is a tokenizer that is there: vocabulary and lowercase are its own.")
        return self


class CorpusConfig(Section):
    """The text.

    Attributes:
        train: files, folders with .txt files, patterns such as texts/*.txt, or embedded:sotu.
        validation: the same; None: a share of the pages of the others is set aside.
        validation_share: how much.
        validation_blocks: how many blocks are scored at most.
        length: tokens of a block.
        masked: the share of tokens that is hidden, where masks are to be looked behind.
        whole_words: whether all tokens of a word are hidden together.
    """

    train: Sources
    validation: Sources | None = None
    validation_share: Share = 0.02
    validation_blocks: Count = 500
    length: Count = 128
    masked: Annotated[StrictFloat, Field(gt=0, lt=1)] = 0.15
    whole_words: StrictBool = True


class PretrainingConfig(TrainingConfig):
    """As for any training, and how often the model is scored.

    Attributes:
        evaluations: in an epoch; the best is kept.
    """

    epochs: Count = 1
    weight_decay: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 0.01
    evaluations: Count = 5


class PretrainRecipe(RunRecipe):
    """One model and one corpus.

    Attributes:
        model: a model to go on from, as for `train`, or a new one.
        tokenizer: of a new model.
        objective: masked: tokens behind masks are to be found; causal: the next one; None: what the model is made for.
        corpus: the text.
        technique: what is trained; a new model's is all of it.
        training: how.
        output: the folder of the results.
    """

    command: ClassVar = "pretrain"
    texts_field: ClassVar = "corpus"
    metric: ClassVar = "loss"

    model: Annotated[str | NewModel, PlainValidator(_start), PlainSerializer(_written, return_type=Any)]
    tokenizer: TokenizerConfig = TokenizerConfig()
    objective: Objective | None = None
    corpus: CorpusConfig
    technique: Technique = Field(default_factory=lambda: TechniqueSpec.parse("full"))
    training: PretrainingConfig = PretrainingConfig()
    output: OutputFolder

    @property
    def texts(self) -> tuple[str, ...]:
        """The corpus."""
        return (*self.corpus.train, *(self.corpus.validation or ()))

    @model_validator(mode="after")
    def _agrees(self) -> PretrainRecipe:
        if isinstance(self.model, str) and self.tokenizer != TokenizerConfig():
            raise ValueError(f"tokenizer is that of a new model; model={shown(self.model)} has its own.")
        if not isinstance(self.model, str) and self.technique.name != "full":
            raise ValueError(f"technique={self.technique.name} leaves a new model's random weights as they are.")
        self._refuse_head_rate()
        if self.training.precision == "int8":
            raise ValueError("training.precision=int8 is for frozen weights, and these learn. Use fp32 or bf16.")
        return self


def load_pretrain_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """Reads and checks a recipe, as `read_recipe` does."""
    return read_recipe(PretrainRecipe, path, overrides, lambda fields: {"technique": "full"})
