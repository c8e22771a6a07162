"""Put techniques on a model: `attach` freezes it, finds the places and builds the deltas; `load` reads saved ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from smidgen import storage, targets
from smidgen.adapter import Adapter
from smidgen.delta import Method
from smidgen.layers import positions
from smidgen.manifest import checked_name, folder_of
from smidgen.own import head_names, own_modules, own_parameters
from smidgen.stacking import active_adapters, adapters, check_not_routed, set_active

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach(
    model: PreTrainedModel,
    methods: Method | Sequence[Method],
    *,
    name: str = "default",
    also_train: str | Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Freeze `model` and put one adapter on it, made of one technique or of several.

    The model computes what it did before wherever the technique starts at the identity (each technique's page says so).
    A task head (a classifier, say) is trained with every technique. Adapters attached before stay on the model, frozen
    and inactive.

    Args:
        model: a transformers model; its own modules, names and classes stay as they are.
        methods: the technique, or several that form one adapter, in the order in which they act.
        name: the adapter's name: anything that can be read on one line.
        also_train: patterns of the model's own parameters to train as well, such as "LayerNorm.*" or "embeddings.*".
        tokenizer: needed only by techniques that start from a text.

    Returns:
        The handle to train, save, disable, merge and detach it by.

    Raises:
        ValueError: a target matches nothing, the name is taken or malformed, or the model cannot take the technique or
            lies on several devices; the model is then as it was.
        RuntimeError: the adapter that is active now cannot be deactivated (see `Adapter.deactivate`).
        TypeError: the model is not one of transformers, or has an adapter of peft's on it.
    """
    methods = (methods,) if isinstance(methods, (Method, type, str)) else tuple(methods)
    if wrong := [method for method in methods if not isinstance(method, Method)]:
        raise TypeError(f"attach takes techniques such as LoRA(rank=8), or a list of them; got {wrong[0]!r}.")
    if not methods:
        raise ValueError("No technique was given. Pass one, such as LoRA(rank=8), or a list of them.")
    _check_model(model)
    check_name(model, name)
    with alone(model):
        places = [method.places(model) for method in methods]
        _check_room(model, methods)
        own = own_names(model, methods, also_train)
        with torch.device(model.device):
            deltas = [method.build_all(model, found) for method, found in zip(methods, places, strict=True)]
        for method, found, built in zip(methods, places, deltas, strict=True):
            with torch.no_grad():
                method.initialize(model, found, built, tokenizer)
        return Adapter(model, name, methods, places, deltas, own)


def _check_room(model: PreTrainedModel, methods: Sequence[Method]) -> None:
    """Raise a ValueError if virtual tokens leave no position for a text."""
    virtual, limit = sum(method.virtual_tokens for method in methods), positions(model)
    if virtual and limit is not None and virtual >= limit:
        longest = max(methods, key=lambda method: method.virtual_tokens)
        raise ValueError(
            f"{longest.title}'s length={longest.virtual_tokens} leaves no room for a text: {virtual} virtual tokens in "
            f"all take the {limit} positions of {type(model).__name__}. Lower it."
        )


def _check_model(model: object) -> None:
    """Raise unless it is a model of transformers, on one device, without anything of peft's on it."""
    from transformers import PreTrainedModel

    of_peft = "peft's, whose own layers would be taken for the model's. Give the model that peft was given"
    if not isinstance(model, PreTrainedModel):
        what = of_peft if hasattr(model, "peft_config") else "not a model of transformers"
        raise TypeError(f"A {type(model).__name__} is {what}.")
    if getattr(model, "_hf_peft_config_loaded", False) or any(
        type(module).__module__.startswith("peft.") for _, module in own_modules(model)
    ):
        raise TypeError(
            f"The {type(model).__name__} has an adapter of peft's on it. Take it off, or load the model anew."
        )
    if len(devices := sorted({str(parameter.device) for _, parameter in own_parameters(model)})) > 1:
        raise ValueError(
            f"The {type(model).__name__} lies on several devices: {', '.join(devices)}. Load it on one, "
            "without device_map."
        )


def load(
    model: PreTrainedModel,
    path: str | Path,
    *,
    name: str | None = None,
    check_base: bool = True,
    head: bool = True,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put the adapter saved at `path`, by us or by peft, on `model`, active and ready to serve or to train on.

    Args:
        model: the model that it was trained for.
        path: a folder that `Adapter.save` or peft's `save_pretrained` wrote, or the output of a run with one in it.
        name: another name for it; default: the one it was saved under.
        check_base: whether the model's weights must be those that it was trained on; peft's folders do not say.
        head: whether its task head comes along; otherwise the model's own is trained, which may have other classes:
            one task's adapter as another's start.
        dtype: number format of all that it brings; fp32 is the one to train on in, and a head in it beside a bfloat16
            model computes under autocast. Default: the file's, and of the model's own parameters, such as a head, the
            model's.

    Raises:
        UserError: the folder is damaged, incomplete, not an adapter, or an adapter for another model; the model is as
        it was.
        ValueError: the model lies on several devices.
    """
    from smidgen.formats import from_peft

    _check_model(model)
    with alone(model):
        path = folder_of(Path(path))
        saved = (
            from_peft.read(model, path, head=head)
            if from_peft.is_peft(path)
            else storage.read(model, path, check_base=check_base, head=head)
        )
        check_name(model, name or saved.name)
        return storage.put(model, saved, name or saved.name, dtype)


@contextlib.contextmanager
def alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no adapter is active, so that a new one sees the base model; if it fails, all is as it was."""
    check_not_routed(model)
    before = active_adapters(model)
    set_active(model, [])
    try:
        yield
    except BaseException:
        set_active(model, before)
        raise


def own_names(model: PreTrainedModel, methods: Sequence[Method], also_train: str | Sequence[str]) -> list[str]:
    """The model's own parameters that the techniques train, its head included, in the model's order.

    Raises:
        ValueError: a pattern of `also_train` matches no parameter.
    """
    names = [name for name, _ in own_parameters(model)]
    wanted = {*head_names(model), *(name for method in methods for name in method.own_parameters(model))}
    for pattern in [also_train] if isinstance(also_train, str) else also_train:
        expression = targets.compiled(pattern, f"also_train={pattern!r} is no pattern")
        found = [name for name in names if expression.fullmatch(name)]
        if not found:
            raise ValueError(
                f"also_train={pattern!r} matches no parameter of {type(model).__name__}, such as {names[0]!r}."
            )
        wanted.update(found)
    return [name for name in names if name in wanted]


def check_name(model: nn.Module, name: str) -> None:
    """Raise a ValueError unless a new adapter can have this name."""
    if checked_name(name) in adapters(model):
        raise ValueError(f"The model has an adapter {name!r} already. Choose another name, or detach that one first.")
