"""An adapter as a folder: `adapter.json`, which says everything, and `adapter.safetensors`, the numbers.

Writing is atomic and durable. Reading is strict and closed: whatever is missing, unknown, of another shape, not
finite or not of its recorded SHA-256 is an error before the model is touched; nothing in a file names code, a pattern
or an address.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import attention, files, manifest, targets
from smidgen.delta import Delta, Method
from smidgen.errors import UserError, difference
from smidgen.manifest import FORMAT, TENSORS, Base, Manifest, SavedPlace, Technique
from smidgen.own import head_names, own_modules, own_parameters
from smidgen.targets import Place
from smidgen.tensors import Shapes, read_shapes, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter

_SAMPLE = 1024  # numbers of each tensor that the base model's fingerprint looks at


@dataclasses.dataclass(frozen=True)
class Saved:
    """An adapter read from a folder and checked against a model, not yet put on it.

    Attributes:
        own: the model's own parameters that it brings, by name.
        new_head: whether its head was left behind, so that the model's own is trained.
    """

    name: str
    methods: list[Method]
    places: list[list[Place]]
    deltas: list[list[Delta]]
    own: dict[str, Tensor]
    labels: list[str] | None
    new_head: bool


def save(adapter: Adapter, path: Path, metrics: Mapping[str, Any], labels: Sequence[str] | None) -> None:
    """Write `adapter` to the folder `path`; see `Adapter.save`."""
    from safetensors.torch import save_file

    from smidgen import __version__

    own = [name for name, _ in adapter.named_parameters() if name in adapter.own_names]
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in to_save(adapter).items()}
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{wrong[0]} holds numbers that are not finite, so that nothing was written: training diverged."
        )
    classes = adapter.model.config.num_labels
    if labels is not None and len(labels) != classes:
        raise UserError(f"labels={list(labels)} has {len(labels)} names, and the model's head {classes} classes.")
    if labels is not None and len(set(labels)) < len(labels):
        raise UserError(f"labels={list(labels)} holds a name twice.")
    if labels is None and adapter.head_names:
        labels = adapter.labels
    try:
        plain = json.loads(json.dumps(dict(metrics), allow_nan=False))  # numbers that are names become words
    except (TypeError, ValueError) as error:
        raise UserError(
            f"metrics={dict(metrics)} cannot be written as JSON: {error}. Give plain, finite numbers."
        ) from error
    with files.new_folder(path) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        Manifest(
            format=FORMAT,
            smidgen=__version__,
            name=adapter.name,
            base=Base(
                id=str(adapter.model.config._name_or_path),
                kind=type(adapter.model).__name__,
                fingerprint=fingerprint(adapter.model, own),
            ),
            techniques=[
                Technique(
                    technique=method.name,
                    fields=dataclasses.asdict(method.folded(deltas)),
                    places=[SavedPlace(name=p.name, source=p.source, side=p.side, site=p.site) for p in places],
                )
                for method, places, deltas in zip(adapter.methods, adapter.places, adapter.deltas, strict=True)
            ],
            own=own,
            head=[name for name in own if name in adapter.head_names],
            labels=list(labels) if labels is not None else None,
            metrics=plain,
            sha256={TENSORS: files.sha256(folder / TENSORS)},
        ).write(folder)


def to_save(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that a saved adapter holds: folded deltas, then the model's own parameters."""
    folded = [(_prefix(method, place), delta.folded(place.layer)) for method, place, delta in adapter.entries()]
    own = {name: parameter for name, parameter in adapter.named_parameters() if name in adapter.own_names}
    return _once_each(folded) | own


def _prefix(method: Method, place: Place) -> str:
    return f"{place.name}.{method.name}."


def _once_each(states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The tensors of all deltas by their full names; one that several share stands under its first."""
    seen: dict[int, str] = {}
    named = {prefix + name: tensor for prefix, state in states for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if seen.setdefault(id(tensor), name) == name}


def read(model: PreTrainedModel, path: Path, *, check_base: bool = True, head: bool = True) -> Saved:
    """Read the adapter in the folder `path`, with or without its head, and check it against `model`, left as it is.

    Raises:
        UserError: the folder is damaged or is not an adapter for this model.
    """
    saved = manifest.read(path)
    if files.sha256(path / TENSORS) != saved.sha256[TENSORS]:
        raise UserError(
            f"{path / TENSORS} was changed or cut short after it was saved (its SHA-256 differs). Copy it again."
        )
    try:
        methods, places = _methods(model, saved.techniques)
        if head and saved.labels is not None and len(saved.labels) != model.config.num_labels:
            raise ValueError(f"it has {len(saved.labels)} labels, and the model's head {model.config.num_labels}")
        _check_base(model, path, saved.base, [*saved.own, *(() if head else head_names(model))], check_base)
        shapes = read_shapes(path / TENSORS)
        return filled(
            model,
            saved.name,
            methods,
            places,
            saved.own,
            saved.labels,
            shapes,
            lambda: read_tensors(path / TENSORS),
            without=None if head else saved.head,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not an adapter for this {type(model).__name__}: {error}") from error


def filled(
    model: PreTrainedModel,
    name: str,
    methods: list[Method],
    places: list[list[Place]],
    own: Sequence[str],
    labels: list[str] | None,
    shapes: Shapes,
    read: Callable[[], dict[str, Tensor]],
    *,
    without: Sequence[str] | None = None,
) -> Saved:
    """An adapter's deltas with the tensors that `read` gives, whose names and `shapes` are checked before it is called.

    The parameters `without`, its head's, are left behind; None: the head comes along.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape than the techniques and the model have it.
    """
    new_head = without is not None
    own = [key for key in own if key not in (without or ())]
    shapes = {key: shape for key, shape in shapes.items() if key not in (without or ())}
    with torch.device("meta"):
        deltas = [method.build_all(model, found) for method, found in zip(methods, places, strict=True)]
    _check_shapes(model, _states(methods, places, deltas), own, shapes)
    tensors = read()
    for method, found, built in zip(methods, places, deltas, strict=True):
        for place, delta in zip(found, built, strict=True):
            given = {key: tensors.get(_prefix(method, place) + key) for key in delta.state_dict()}
            state = {key: tensor.to(model.device) for key, tensor in given.items() if tensor is not None}
            delta.load_state_dict({**delta.state_dict(keep_vars=True), **state}, assign=True)
            delta.to(model.device)  # what is not in the file
    kept = {key: tensors[key] for key in own}
    return Saved(name, methods, places, deltas, kept, None if new_head else labels, new_head)


def _states(
    methods: Sequence[Method], places: Sequence[Sequence[Place]], deltas: Sequence[Sequence[Delta]]
) -> dict[str, Tensor]:
    return _once_each(
        (_prefix(method, place), delta.state_dict(keep_vars=True))
        for method, found, built in zip(methods, places, deltas, strict=True)
        for place, delta in zip(found, built, strict=True)
    )


def _check_shapes(model: PreTrainedModel, states: Mapping[str, Tensor], own: Sequence[str], shapes: Shapes) -> None:
    """Raise a ValueError unless a file's names and shapes are exactly those expected."""
    parameters = dict(own_parameters(model))
    if unknown := [name for name in own if name not in parameters]:
        raise ValueError(f"it trained {unknown[0]!r}, which the model does not have")
    expected = {name: tuple(parameters[name].shape) for name in own}
    expected |= {name: tuple(tensor.shape) for name, tensor in states.items()}
    if shapes.keys() != expected.keys():
        raise ValueError(f"its tensors are others: {difference(expected, shapes)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} is {shapes[name]} in the file and {shape} in the model")


def put(model: PreTrainedModel, saved: Saved, name: str, dtype: torch.dtype | None = None) -> Adapter:
    """Put an adapter that was read on its model."""
    from smidgen.adapter import Adapter
    from smidgen.stacking import set_labels

    own = [*saved.own, *(head_names(model) if saved.new_head else ())]
    for delta in (delta for built in saved.deltas for delta in built if dtype is not None):
        delta.to(dtype)
    adapter = Adapter(model, name, saved.methods, saved.places, saved.deltas, own)
    parameters = dict(adapter.named_parameters())
    for key, tensor in saved.own.items():
        parameters[key].data = tensor.to(parameters[key].device, dtype or parameters[key].dtype)
    if saved.labels is not None:
        set_labels(model, saved.labels)
    return adapter


def _methods(model: PreTrainedModel, techniques: Sequence[Technique]) -> tuple[list[Method], list[list[Place]]]:
    from smidgen.methods import METHODS

    methods: list[Method] = []
    places: list[list[Place]] = []
    for entry in techniques:
        if entry.technique not in METHODS:
            raise UserError(f"The technique {entry.technique!r} is not known here; known: {', '.join(METHODS)}.")
        kind = METHODS[entry.technique]
        known = {field.name for field in dataclasses.fields(kind)}
        if entry.fields.keys() != known:
            raise ValueError(f"{kind.title} has the fields {sorted(known)}, the file {sorted(entry.fields)}")
        method = kind(**entry.fields)
        methods.append(method)
        places.append(_places(model, entry.places))
    return methods, places


def _places(model: PreTrainedModel, saved: Sequence[SavedPlace]) -> list[Place]:
    known: dict[str, dict[str, Place]] = {}
    if any(place.site == "attention" for place in saved):
        known["attention"] = {place.name: place for place in attention.find(model)}
    if any(place.site == "embedding" for place in saved):
        known["embedding"] = {place.name: place for place in [targets.embedding(model)]}
    found: list[Place] = []
    for place in saved:
        if place.site == "layer":
            found.append(targets.exact(model, place.name, place.source, place.side))
        elif place.name in known[place.site]:
            found.append(known[place.site][place.name])
        else:
            what = "a prefix" if place.site == "attention" else "a prompt"
            raise ValueError(f"it has {what} at {place.name!r}, which is no {place.site} of this model that takes one")
    return found


def _check_base(model: PreTrainedModel, path: Path, base: Base, own: Sequence[str], check: bool) -> None:
    if not check or fingerprint(model, own) == base.fingerprint:
        return
    raise UserError(
        f"{path} was trained on other weights: on {base.kind} {base.id!r}, and this is {type(model).__name__} "
        f"{model.config._name_or_path!r}. Load that model, or pass check_base=False if the two are meant to differ."
    )


def fingerprint(model: PreTrainedModel, without: Sequence[str]) -> str:
    """A hash of the base model: names, shapes and evenly spaced values of its parameters, except those `without`.

    The values are compared as bfloat16, so that a model loaded in bfloat16 is the one that was trained on in fp32.
    """
    from smidgen.stacking import adapters

    original: dict[str, Tensor] = {}
    for adapter in adapters(model).values():
        original = {**adapter.base_parameters(), **original}  # the first adapter saw the base model
    samples = {name: sampled(original.get(name, parameter)) for name, parameter in own_parameters(model)}
    rounded = ((f"{name}.weight", vars(module).get("original")) for name, module in own_modules(model))  # to 8 bits
    samples.update((name, before) for name, before in rounded if before is not None)
    digest = hashlib.sha256()
    for name in sorted(samples.keys() - set(without)):
        digest.update(f"{name} ".encode() + samples[name])
    return digest.hexdigest()


def sampled(parameter: Tensor) -> bytes:
    """A parameter's shape and evenly spaced values of it, as the fingerprint has them."""
    flat = parameter.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.bfloat16).contiguous()
    return f"{tuple(parameter.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes()
