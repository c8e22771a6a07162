"""Which adapters are on a model, and which of them act: one, none, or a stack of several, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter
    from smidgen.delta import Delta, Method
    from smidgen.targets import Place


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on this model, by name, in the order of their attachment."""
    return vars(model).setdefault("_smidgen_adapters", {})  # type: ignore[no-any-return]


def named_adapters(model: nn.Module, names: Iterable[str]) -> list[Adapter]:
    """The adapters of these names.

    Raises:
        ValueError: the model has none of a name.
    """
    known, names = adapters(model), list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"The model has no adapter {unknown[0]!r}. It has: {', '.join(known) or 'none'}.")
    return [known[name] for name in names]


def active_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters that the model computes with now, in the order in which they act."""
    on = adapters(model)
    return [on[name] for name in vars(model).get("_smidgen_active", ())]


def stack(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Let several adapters act, one after the other: the last one trains, the others are frozen.

    So is an adapter for a task put over one for a language (MAD-X, 2005.00052): train the task's over one language,
    then stack it over another. Where two change the same layer, the later one sees what the earlier has made of it;
    where both have a head or train the same of the model's own parameters, the later one's count. `activate` of one
    adapter ends the stack. Inside `rows` each row has one adapter.

    Args:
        model: the model that the adapters are on.
        names: their names, from the first that acts to the last.

    Raises:
        ValueError: no name is given, one twice, or the model has no adapter of a name; or one computes with the weight
            of a layer that an earlier one changes, as DoRA does. Nothing is changed then.
        RuntimeError: the adapter that is active now cannot be deactivated (see `Adapter.deactivate`).
    """
    check_not_routed(model)
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f'stack takes a list of different names, such as ["language", "task"]; got {names!r}.')
    wanted = named_adapters(model, names)
    check_order(entry for adapter in wanted for entry in adapter.entries())
    set_active(model, wanted)


def check_order(entries: Iterable[tuple[Method, Place, Delta]]) -> None:
    """Raise a ValueError if a technique that computes with a layer's weight comes after one that changes its output.

    Args:
        entries: each delta with its technique and its place, in the order in which they act.
    """
    changed: set[str] = set()
    for method, place, _ in entries:
        if method.needs_plain_output and place.name in changed:
            raise ValueError(
                f"{method.title} reads the weight of {place.name}, whose output another technique changes before. "
                f"Put {method.title} first."
            )
        changed.update({place.name} if place.side == "output" else ())


def set_active(model: PreTrainedModel, wanted: Sequence[Adapter]) -> None:
    """Let exactly these act, in this order, of which the last one trains.

    Raises:
        RuntimeError: one that acts now trains the model in place, so that the base model is not there any more.
    """
    now, config = active_adapters(model), model.config
    if now == list(wanted):
        return
    for adapter in now:
        adapter.check_base_kept()
    if now:
        now[-1].own_labels = config.id2label, config.label2id
        config.id2label, config.label2id = now[-1].base_labels
    for adapter in reversed(now):
        adapter.stop()
    vars(model)["_smidgen_active"] = [adapter.name for adapter in wanted]
    for order, adapter in enumerate(wanted, start=1):
        adapter.start(order, trains=order == len(wanted))
    if wanted:
        config.id2label, config.label2id = wanted[-1].own_labels


@contextlib.contextmanager
def none_active(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no adapter acts; those that did, and are still on the model, do so again afterwards."""
    before = active_adapters(model)
    set_active(model, [])
    try:
        yield
    finally:
        set_active(model, [adapter for adapter in before if adapters(model).get(adapter.name) is adapter])


def set_labels(model: PreTrainedModel, labels: Sequence[str]) -> None:
    """Let the model's config have the label names of the adapter that is active."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def check_not_routed(model: nn.Module) -> None:
    """Raise a RuntimeError inside `rows`, where each row has its adapter already."""
    if vars(model).get("_smidgen_routed"):
        raise RuntimeError("Inside rows() each row has its own adapter; leave it before changing which one is active.")
