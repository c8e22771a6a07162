"""Which adapter serves which row of a batch: `rows(model, ["a", None, "b"])`, in training and inference.

Every delta computes on the rows of its adapter alone. Attention sees a prefix from its own rows only; a shorter prompt
stands at the end of the columns of the longest, hidden before it. A module whose own parameters an adapter trains (a
head, a norm) runs once more for that adapter's rows, with its parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.adapter import Adapter
from smidgen.hooks import Batch, Route, taken
from smidgen.stacking import active_adapters, check_not_routed, named_adapters, set_active

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def rows(model: PreTrainedModel, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, each row of a batch has the adapter that is named for it; None: the base model.

    A row's result equals that of the adapter alone on it. In training, each adapter gets the gradients of its rows.
    `generate` may widen the batch, as beams do: the rows that come from one text keep its adapter. With gradient
    checkpointing, call `backward` inside as well. Not to be used from several threads at once, nor nested.

    Args:
        model: the model that the adapters are on.
        names: an adapter's name for each row of the batches that come.

    Raises:
        ValueError: there is no adapter of a name, `names` is no list or empty, or an adapter's place does not see rows.
        RuntimeError: the adapter that is active now cannot be deactivated (see `Adapter.deactivate`), or this is inside
            another `rows`.
    """
    check_not_routed(model)
    if isinstance(names, str):
        raise ValueError(f"rows takes a list with a name, or None, for each row of the batch; got {names!r}.")
    used = named_adapters(model, [name for name in dict.fromkeys(names) if name is not None])
    if not names:
        raise ValueError("rows needs a name, or None, for each row of the batch; it got none.")
    for adapter in used:
        _check_places(adapter)
    before, batch = active_adapters(model), Batch(names)
    set_active(model, [])
    handles: list[RemovableHandle] = []
    vars(model)["_smidgen_routed"] = True
    own_generate = vars(model).get("generate")
    batches = _Batches(model, batch)
    try:
        handles.append(model.register_forward_pre_hook(batches.check, with_kwargs=True))
        if hasattr(model, "generate"):
            vars(model)["generate"] = batches.generate
        for adapter in used:
            route = Route(adapter.name, batch)
            adapter.serve(active=True, route=route)
            handles += _route_own(adapter, route)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for adapter in used:
            adapter.serve(active=False)
        for key, value in (("_smidgen_routed", None), ("generate", own_generate)):
            vars(model).pop(key, None)
            if value is not None:
                vars(model)[key] = value
        set_active(model, before)


class _Batches:
    """Sees to it that a batch has the rows that adapters are named for; `generate` alone may have several for each."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.batch, self._generating = batch, False
        self._generate: Any = getattr(model, "generate", None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        self._generating = True
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._generating, self.batch.rows = False, len(self.batch.names)

    def check(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a ValueError for another number of rows."""
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        if given is None:
            return
        rows, count = given.shape[0], len(self.batch.names)
        if rows != count and not (self._generating and rows % count == 0):
            raise ValueError(
                f"rows names adapters for {count} rows, and the batch has {rows}. Give a name for each row."
            )
        self.batch.rows = rows


def _check_places(adapter: Adapter) -> None:
    """Raise a ValueError if a delta could not tell the rows apart.

    Its place sees tokens that a router has picked, and not the rows of a batch; it computes with a weight or a bias of
    the layer's, of which the adapter trains its own; or the model does not compute row by row.
    """
    if adapter.model.config.model_type == "xlnet":
        raise ValueError("XLNet computes with a text's tokens before its rows, which cannot be told apart in a layer.")
    if pairs := [name for name in adapter.own_names if "relative_attention_bias" in name]:
        raise ValueError(
            f"Adapter {adapter.name!r} trains {pairs[0]}, which is looked up for pairs of positions, once for "
            "all rows. Serve it alone."
        )
    for method, place, _ in adapter.entries():
        own = {f"{place.name}.weight", f"{place.name}.bias"} & adapter.own_names
        if method.needs_plain_output and own:
            raise ValueError(
                f"{method.title} of adapter {adapter.name!r} computes with {min(own)}, which the adapter trains as "
                "well, so that its rows would get the base model's. Serve it alone."
            )
        if ".experts." in f".{place.name}.":
            raise ValueError(
                f"{method.title} of adapter {adapter.name!r} is at {place.name}, one of several experts, which sees "
                "tokens and not rows. Serve it alone, or choose other targets."
            )


def _route_own(adapter: Adapter, route: Route) -> list[RemovableHandle]:
    """Let the modules whose parameters the adapter trains compute its rows with them."""
    return [
        module.register_forward_hook(_with_own(parameters, route), with_kwargs=True, prepend=True)
        for module, parameters in adapter.own_slots()
    ]


def _with_own(parameters: dict[str, nn.Parameter], route: Route) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"A {type(module).__name__} whose parameters adapter {route.name!r} trains gives no tensor, so that "
                "its rows cannot be told apart. Serve that adapter alone."
            )
        if output.shape[0] == 1 and isinstance(module, nn.Embedding):  # the same for all rows, as positions are
            output = output.expand(route.batch.rows, *output.shape[1:])
        served, batch = route.served(output), output.shape[0]
        if not served:
            return output
        index = torch.tensor(served, device=output.device)
        own = _swapped(module, parameters)
        with own, route.alone():
            part = module.forward(
                *(taken(value, index, batch) for value in args),
                **{name: taken(value, index, batch) for name, value in kwargs.items()},
            )
        return output.index_copy(0, index, part.expand(len(index), *part.shape[1:]).to(output.dtype))

    return hook


@contextlib.contextmanager
def _swapped(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    before = {slot: module.get_parameter(slot) for slot in parameters}
    try:
        for slot, parameter in parameters.items():
            setattr(module, slot, parameter)
        yield
    finally:
        for slot, parameter in before.items():
            setattr(module, slot, parameter)
