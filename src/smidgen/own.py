"""The model's own modules and parameters; those that an adapter trains, each beside its frozen original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from smidgen.hooks import Deltas


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name, each once; what adapters have added to it is passed over without a look."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
        if module is None or module in seen or isinstance(module, Deltas | OwnParameters):
            return
        seen.add(module)
        yield name, module
        for child, inner in module._modules.items():  # named_children looks for repetitions once more
            yield from walk(f"{name}.{child}" if name else child, inner)

    return walk("", model)


def own_module(model: nn.Module, name: str) -> nn.Module | None:
    """The model's own module of this name, if there is one."""
    module: nn.Module | None = model
    for child in name.split(".") if name else ():
        module = getattr(module, "_modules", {}).get(child)
        if isinstance(module, Deltas | OwnParameters):
            return None
    return module


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters by name, each once: what adapters have added to it is left out."""
    seen: set[int] = set()
    for name, module in own_modules(model):
        for slot, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{slot}" if name else slot, parameter


def check_unquantized(technique: str, model: nn.Module) -> None:
    """Raise a ValueError if a layer has a weight in whole numbers, which cannot be trained."""
    for name, module in own_modules(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            raise ValueError(
                f"{technique} trains the model's weights, and {name}'s is quantized. Load the model unquantized "
                "(training.precision fp32 or bf16), or use LoRA or an adapter."
            )


def count(model: nn.Module) -> int:
    """How many numbers the model itself has, those in whole numbers included."""
    whole = (
        buffer.numel()
        for _, module in own_modules(model)
        for buffer in module._buffers.values()
        if buffer is not None and buffer.dtype == torch.int8
    )
    return sum(parameter.numel() for _, parameter in own_parameters(model)) + sum(whole)


class OwnParameters(nn.Module):
    """Swaps an adapter's versions of some of the model's parameters in and out, as objects, without copying values.

    A module without parameters of its own: as a child of the model it hears of `model.to(...)`, and brings along those
    that do not stand in the model at that moment.

    Args:
        model: the model that the parameters belong to.
        names: which, by their names in the model.
        keep_base: whether to keep the originals. Without them the memory of a second copy is saved, and the parameters
            cannot be put back.
    """

    names: frozenset[str]
    base: dict[str, nn.Parameter]
    _own: dict[str, nn.Parameter]
    _slots: list[tuple[nn.Module, str, str]]

    def __init__(self, model: nn.Module, names: Iterable[str], *, keep_base: bool) -> None:
        super().__init__()
        wanted = set(names)
        self.keep_base = keep_base
        base = {name: parameter for name, parameter in own_parameters(model) if name in wanted}
        identity = {id(parameter): name for name, parameter in base.items()}
        self.names = frozenset(base)
        self.base = base if keep_base else {}  # in a plain dict: registered, they would be the model's parameters
        self._own = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in self.base.items()}
        self._slots = [  # tied parameters have several
            (module, slot, identity[id(parameter)])
            for _, module in own_modules(model)
            for slot, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(parameter) in identity
        ]
        if keep_base:
            self.put_own()

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's versions, by name; without the originals, what stands in the model."""
        if self.keep_base:
            return self._own
        return {name: module.get_parameter(slot) for module, slot, name in reversed(self._slots)}

    def by_module(self) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
        """The adapter's versions, beside the modules that they stand in."""
        own, found = self.own(), dict[nn.Module, dict[str, nn.Parameter]]()
        for module, slot, name in self._slots:
            found.setdefault(module, {})[slot] = own[name]
        return list(found.items())

    def put_own(self) -> None:
        """Let the adapter's versions stand in the model."""
        self._put(self.own())

    def put_base(self) -> None:
        """Let the originals stand in the model."""
        self._put(self.base)

    def _put(self, parameters: dict[str, nn.Parameter]) -> None:
        for module, slot, name in self._slots:
            setattr(module, slot, parameters[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnParameters:
        """Move or cast what does not stand in the model along with it."""
        inside = {id(getattr(module, slot)) for module, slot, _ in self._slots}
        with torch.no_grad():
            for parameter in (*self.base.values(), *self._own.values()):
                if id(parameter) not in inside:
                    parameter.data = fn(parameter.data)
        return self


def head_names(model: nn.Module) -> list[str]:
    """The parameters of the task head: what lies outside the base model and its output embedding, and the pooler.

    The dense layer between the last block and the classifier belongs to the head, which alone reads it. RoBERTa,
    DistilBERT, ELECTRA and DeBERTa have it outside the base model; BERT and ALBERT inside, under the name pooler.
    """
    base, output = getattr(model, "base_model", model), None
    if base is model:
        return []
    if callable(getattr(model, "get_output_embeddings", None)):
        output = model.get_output_embeddings()  # type: ignore[operator]
    outside = [child for child in model.children() if child is not base and output not in set(child.modules())]
    pooler = getattr(base, "pooler", None)
    wanted = {
        id(parameter)
        for module in (*outside, *([pooler] if isinstance(pooler, nn.Module) else []))
        for _, parameter in own_parameters(module)
    }
    return [name for name, parameter in own_parameters(model) if id(parameter) in wanted]
