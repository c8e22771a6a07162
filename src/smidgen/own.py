"""The model's own parameters that an adapter trains (heads, norms, or all of them), each beside its frozen original."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class OwnParameters:
    """Swaps an adapter's versions of some of the model's parameters in and out, as objects, without copying values.

    Args:
        model: the model that the parameters belong to.
        names: which, by their names in the model.
        keep_base: whether to keep the originals. Without them the memory of a second copy is saved, and the parameters
            cannot be put back.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, keep_base: bool) -> None:
        wanted = set(names)
        self.keep_base = keep_base
        self.base = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
        identity = {id(parameter): name for name, parameter in self.base.items()}
        self._slots = [  # tied parameters have several
            (module, slot, identity[id(parameter)])
            for module in model.modules()
            for slot, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(parameter) in identity
        ]
        if keep_base:
            self.put({name: nn.Parameter(parameter.detach().clone()) for name, parameter in self.base.items()})

    def current(self) -> dict[str, nn.Parameter]:
        """What stands in the model now, by name."""
        return {name: module.get_parameter(slot) for module, slot, name in reversed(self._slots)}

    def put(self, parameters: dict[str, nn.Parameter]) -> None:
        """Let these stand in the model."""
        for module, slot, name in self._slots:
            setattr(module, slot, parameters[name])


def head_names(model: nn.Module) -> list[str]:
    """The parameters of the task head: those outside the base model and the output embedding."""
    base, output = getattr(model, "base_model", model), None
    if base is model:
        return []
    if callable(getattr(model, "get_output_embeddings", None)):
        output = model.get_output_embeddings()  # type: ignore[operator]
    return [
        f"{child}.{name}"
        for child, module in model.named_children()
        if module is not base and output not in set(module.modules())
        for name, _ in module.named_parameters()
    ]
