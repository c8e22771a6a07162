"""The model that a pre-training starts from: one trained before, or random weights with a tokenizer of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smidgen import files
from smidgen.errors import UserError
from smidgen.process import checkpoint
from smidgen.process.corpus import pages
from smidgen.process.encoding import pad_id
from smidgen.process.models import DTYPES, from_pretrained, pretrained_folder
from smidgen.process.parallel import this_process
from smidgen.process.pretrain_recipe import NewModel, PretrainRecipe
from smidgen.process.problems import shown, unknown
from smidgen.process.vocabulary import Objective, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES: dict[Objective, str] = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


def made_for(model: str | NewModel) -> Objective:
    """Masked for models that see both sides of a token, causal for those that see what comes before it."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    if isinstance(model, NewModel):
        config = _config(model)
    else:
        try:
            config = AutoConfig.from_pretrained(pretrained_folder(model))
        except (OSError, ValueError) as error:
            raise UserError(f"model={model!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type} has an encoder and a decoder, whose pre-training is not here.")
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise UserError(f"{config.model_type} is no model of language that transformers knows.")


def _config(model: NewModel, **more: Any) -> PretrainedConfig:
    """The configuration of a new model.

    Raises:
        UserError: transformers knows no such type, or the type no such field.
    """
    from transformers import CONFIG_MAPPING

    if model.type not in CONFIG_MAPPING:
        raise UserError(
            f"model.type={shown(model.type)} is no type of transformers.{unknown(model.type, CONFIG_MAPPING)}"
        )
    kind = CONFIG_MAPPING[model.type]
    known = {*kind().to_dict(), *kind.attribute_map}
    for field in model.config:
        if field in ("vocab_size", *more) or field.endswith("token_id"):
            raise UserError(f"model.config.{field} is given by the tokenizer. Leave it out.")
        if field not in known:
            raise UserError(f"model.config.{field} is no field of {model.type}.{unknown(field, known)}")
    try:
        return kind(**model.config, **more)
    except Exception as error:  # each configuration checks its own fields in its own way
        raise UserError(f"model.config does not make a {model.type}: {' '.join(str(error).split())}") from error


def model_and_tokenizer(
    recipe: PretrainRecipe, objective: Objective, paths: Sequence[Path]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a recipe and its tokenizer: loaded, or made new.

    Args:
        recipe: names them.
        objective: what the model's head is for.
        paths: the corpus, which a new tokenizer is trained on.

    Raises:
        UserError: one of them cannot be had.
    """
    training = recipe.training
    if isinstance(recipe.model, str):
        what = f"{objective} language modelling"
        return from_pretrained(
            recipe.model, AUTO_CLASSES[objective], what, seed=training.seed, dtype=DTYPES[training.precision]
        )
    with torch.device("meta"):  # what cannot be made is said before the corpus is read
        _made(recipe.model, objective, _config(recipe.model))
    tokenizer = _tokenizer(recipe, objective, paths)
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = _config(
        recipe.model,
        vocab_size=len(tokenizer),
        pad_token_id=pad_id(tokenizer),
        **{name: getattr(tokenizer, name) for name in names},
    )
    torch.manual_seed(training.seed)
    return _made(recipe.model, objective, config, dtype=DTYPES[training.precision]), tokenizer


def _made(model: NewModel, objective: Objective, config: PretrainedConfig, **arguments: Any) -> PreTrainedModel:
    import transformers

    try:
        made: PreTrainedModel = getattr(transformers, AUTO_CLASSES[objective]).from_config(config, **arguments)
    except Exception as error:  # as of a configuration
        raise UserError(
            f"model.type={model.type} cannot be made for {objective} language modelling: {' '.join(str(error).split())}"
        ) from error
    return made


def _tokenizer(recipe: PretrainRecipe, objective: Objective, paths: Sequence[Path]) -> PreTrainedTokenizerBase:
    """Another model's, or one that is trained on the corpus; a run that goes on takes the one that it began with."""
    from transformers import AutoTokenizer

    wanted, folder = recipe.tokenizer, Path(recipe.output)
    if wanted.of is not None:
        place = pretrained_folder(wanted.of)
    else:
        place = str(folder / "tokenizer")
        if not checkpoint.exists(folder / "checkpoint") and this_process().is_main_process:
            trained = train_tokenizer(
                (page.text for page in pages(paths)),
                wanted.vocabulary,
                objective,
                lowercase=wanted.lowercase,
                length=recipe.corpus.length,
            )
            shutil.rmtree(place, ignore_errors=True)
            with files.new_folder(Path(place)) as new:
                trained.save_pretrained(new)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # as of a model
        raise UserError(f"tokenizer.of={wanted.of!r} cannot be loaded: {' '.join(str(error).split())}") from error
    return tokenizer
