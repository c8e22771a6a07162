"""Read the adapter folders of huggingface/peft as our own adapters.

Facts of peft 0.21.2: `adapter_config.json` and `adapter_model.safetensors`, whose names begin with `base_model.model.`;
a prompt is one tensor, `prompt_embeddings`; a prefix is that, too, with all layers' keys and values side by side. What
has no counterpart here is refused with the reason. No pattern of a file is run, and no pickle is opened.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen import files, storage
from smidgen.errors import UserError
from smidgen.formats.peft_readers import READERS
from smidgen.formats.peft_source import Source, module_of
from smidgen.manifest import PEFT_FILE
from smidgen.own import head_names, own_parameters
from smidgen.tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, TENSORS = PEFT_FILE, "adapter_model.safetensors"


def is_peft(path: Path) -> bool:
    """Whether the folder is an adapter that peft wrote."""
    return (path / CONFIG).is_file()


def read(model: PreTrainedModel, path: Path, *, head: bool = True) -> storage.Saved:
    """Read the folder that peft wrote, with or without its head, and check it against `model`, left as it is.

    Raises:
        UserError: the folder is damaged, holds a pickle, or an adapter that has no counterpart here.
    """
    for name in (CONFIG, TENSORS):
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a link; an adapter's files must lie in its folder.")
    if not (path / TENSORS).is_file():
        raise UserError(f"{path} has no {TENSORS}. A pickle, {path / 'adapter_model.bin'}, is never opened.")
    config = files.read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} holds no fields, but a {type(config).__name__}.")
    kind = str(config.get("peft_type"))
    try:
        if kind not in READERS:
            raise ValueError(f"peft_type={kind} has no counterpart here; known: {', '.join(READERS)}")
        source = Source(model, config, read_tensors(path / TENSORS))
        parts = READERS[kind](source)
        own = _own(source)
        source.check_used()
        methods = [part.method for part in parts]
        places = [[place for place, _ in part.states] for part in parts]
        tensors = {
            f"{place.name}.{part.method.name}.{name}": tensor
            for part in parts
            for place, state in part.states
            for name, tensor in state.items()
        }
        tensors |= own
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        without = None if head else [name for name in head_names(model) if name in own]
        return storage.filled(
            model, _name(path), methods, places, list(own), None, shapes, lambda: tensors, without=without
        )
    except KeyError as error:
        raise UserError(f"{path} is incomplete: a tensor or a field of {error} is missing.") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # torch's, of sizes that do not fit
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no peft adapter for this {type(model).__name__}: {error}") from error


def _name(path: Path) -> str:
    """The folder's name, as far as it can be an adapter's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:64] or "peft"


def _own(source: Source) -> dict[str, Tensor]:
    """What is left: the model's own parameters that were trained whole, biases, norms, and rows of the embedding."""
    own = {f"{module}.bias": tensor for module, tensor in source.take("base_layer.bias").items()}
    tokens = source.field("trainable_token_indices", source.field("token_indices"))
    for ending in ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"):
        for module, rows in source.take(ending).items():
            known = {module: tokens} if isinstance(tokens, list) else tokens or {}
            ids = next((own for key, own in known.items() if module.endswith(key)), None)
            if ids is None:
                raise ValueError(f"it holds rows of {module}, and its configuration says tokens of {list(known)}")
            table = source.model.get_parameter(f"{module}.weight").detach().clone()
            if not set(ids) <= set(range(len(table))) or rows.shape != (len(ids), table.shape[1]):
                raise ValueError(
                    f"{module} has {len(table)} rows of {table.shape[1]} numbers, and the adapter {tuple(rows.shape)}, "
                    f"for tokens from {min(ids, default=0)} to {max(ids, default=0)}"
                )
            table[torch.tensor(ids, device=table.device)] = rows.to(table)
            own[f"{module}.weight"] = table
    parameters = dict(own_parameters(source.model))
    for name, tensor in list(source.tensors.items()):
        del source.tensors[name]
        if ".original_module." in name:  # with bias="all" the head's bias is there three times: this one is not trained
            continue
        plain = module_of(name).replace(".ln_tuning_layers.", ".").replace(".modules_to_save.", ".")
        plain = plain if plain in parameters else module_of(f"base_model.{plain}")
        if plain not in parameters:
            raise ValueError(f"its tensor {name!r} belongs to nothing in the model")
        own[plain] = tensor
    return own
