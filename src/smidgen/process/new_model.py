"""The model that a pre-training starts from: one trained before, or random weights with a tokenizer of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smidgen import files
from smidgen.errors import UserError
from smidgen.layers import position_offset
from smidgen.process.corpus import pages
from smidgen.process.encoding import pad_id
from smidgen.process.models import DTYPES, from_pretrained, pretrained_folder
from smidgen.process.pretrain_recipe import NewModel, PretrainRecipe
from smidgen.process.problems import shown, unknown
from smidgen.process.vocabulary import Objective, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES: dict[Objective, str] = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


def objective_of(recipe: PretrainRecipe) -> Objective:
    """What a recipe asks for, or else what its model is made for: masked where it sees both sides of a token.

    Raises:
        UserError: the model is no model of language, has an encoder and a decoder, or is not made for the objective.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    model = recipe.model
    if isinstance(model, NewModel):
        config = _config(model)
    else:
        try:
            config = AutoConfig.from_pretrained(pretrained_folder(model))
        except (OSError, ValueError) as error:
            raise UserError(f"model={model!r} cannot be loaded: {' '.join(str(error).split())}") from error
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind} has an encoder and a decoder, whose pre-training is not here.")
    made_for: Objective
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        made_for = "masked"
    elif kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        made_for = "causal"
    else:
        raise UserError(f"{kind} is no model of language that transformers knows.")
    if recipe.objective not in (None, made_for):
        sees = "both sides of a token, the answer among them" if made_for == "masked" else "what comes before a token"
        raise UserError(f"objective={recipe.objective}: {kind} sees {sees}. Its objective is {made_for}.")
    return made_for


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
    recipe: PretrainRecipe, objective: Objective, scratch: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a recipe and its tokenizer: loaded, or made new.

    Args:
        recipe: names them.
        objective: what the model's head is for.
        scratch: where a tokenizer is that was trained.

    Raises:
        UserError: one of them cannot be had.
    """
    training = recipe.training
    if isinstance(recipe.model, str):
        what = f"{objective} language modelling"
        model, tokenizer, new = from_pretrained(
            recipe.model, AUTO_CLASSES[objective], what, seed=training.seed, dtype=DTYPES[training.precision]
        )
        if new and recipe.technique.name != "full":
            raise UserError(
                f"technique={recipe.technique.name} would leave {recipe.model}'s head for {what} at random, as it has "
                f"learned none ({sorted(new)[0]} and {len(new) - 1} more). Take full."
            )
        return model, tokenizer
    tokenizer = load_tokenizer(recipe, scratch)
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = _config(
        recipe.model,
        vocab_size=len(tokenizer),
        pad_token_id=pad_id(tokenizer),
        **{name: getattr(tokenizer, name) for name in names},
    )
    torch.manual_seed(training.seed)
    model = _made(recipe.model, objective, config, DTYPES[training.precision])
    positions = getattr(config, "max_position_embeddings", None)
    tokenizer.model_max_length = recipe.corpus.length if positions is None else positions - position_offset(model)
    return model, tokenizer


def check_config(model: NewModel, objective: Objective) -> None:
    """Raise a UserError if the model cannot be made: before the corpus is read, and without its memory."""
    with torch.device("meta"):
        _made(model, objective, _config(model), torch.float32)


def _made(model: NewModel, objective: Objective, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    try:
        made: PreTrainedModel = getattr(transformers, AUTO_CLASSES[objective]).from_config(config, dtype=dtype)
    except Exception as error:  # as of a configuration
        raise UserError(
            f"model.type={model.type} cannot be made for {objective} language modelling: {' '.join(str(error).split())}"
        ) from error
    return made


def write_tokenizer(recipe: PretrainRecipe, objective: Objective, paths: Sequence[Path], scratch: Path) -> None:
    """Train the recipe's tokenizer on the corpus, unless it is another model's."""
    wanted = recipe.tokenizer
    if wanted.of is None:
        texts = (page.text for page in pages(paths))
        trained = train_tokenizer(
            texts, wanted.vocabulary, objective, lowercase=wanted.lowercase, length=recipe.corpus.length
        )
        shutil.rmtree(scratch / "tokenizer", ignore_errors=True)
        with files.new_folder(scratch / "tokenizer") as new:
            trained.save_pretrained(new)


def load_tokenizer(recipe: PretrainRecipe, scratch: Path) -> PreTrainedTokenizerBase:
    """The model's own, another model's, or the one that was trained.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = recipe.model if isinstance(recipe.model, str) else recipe.tokenizer.of
    place = str(scratch / "tokenizer") if source is None else pretrained_folder(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # as of a model
        raise UserError(
            f"The tokenizer of {source or place!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    return tokenizer
