"""The two words a technique is written in: `Method`, its hyperparameters, and `Delta`, what it trains at one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.threads import PerThread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smidgen.targets import Place

Site = Literal["layer", "attention", "embedding"]
"""Where a delta acts: on a layer's output, on the keys and values of an attention, on the input embedding."""


class Delta(nn.Module):
    """What a technique trains at one place: a forward hook with parameters. It acts while `active` is true.

    `forward` depends on the method's site:

    - layer: `forward(layer, inputs, output) -> output`, with `inputs` the layer's positional arguments, or, if
      `reads_source`, those of the layer at the start of the sublayer that this one ends;
    - attention: `forward(batch) -> (keys, values)`, each (batch, key-value heads, virtual tokens, head size);
    - embedding: `forward() -> prompt`, (virtual tokens, hidden size).
    """

    active: bool = True
    reads_source: bool = False
    tap: Tap | None = None

    def merge(self, layer: nn.Module) -> None:
        """Write the delta into the weight of `layer`; only techniques that are an update of a weight can."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The tensors that inference needs; a technique with a reparameterization gives its result."""
        return dict(self.state_dict())


class Deltas(nn.Module):
    """The deltas of one layer, in the order in which they act; a child's name is ADAPTER:TECHNIQUE."""

    handle: RemovableHandle | None = None


class Tap:
    """Remembers what went into an earlier layer of a sublayer, for a delta at its end.

    A forward pre-hook. The tensor is let go of when the delta takes it, so that nothing is kept beyond one pass.
    """

    def __init__(self, layer: nn.Module, delta: Delta) -> None:
        self.delta = delta
        self._inputs: PerThread[tuple[Any, ...] | None] = PerThread(None)
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remember the layer's positional arguments."""
        if self.delta.active:
            self._inputs.set(inputs)

    def take(self) -> tuple[Any, ...]:
        """What went in since the last call."""
        inputs = self._inputs.reset()
        if inputs is None:
            raise RuntimeError("A sublayer's end ran without its start; the model does not call its layers in order.")
        return inputs


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name: what adapters have added to it is left out."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Deltas):
            inside = (*inside, f"{name}.")
        elif not name.startswith(inside):
            yield name, module


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters by name, each once: what adapters have added to it is left out."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Deltas))
    return ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside or "\0"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The hyperparameters of one technique, and how it builds its deltas.

    A technique overrides `check`, `build` (one place) or `build_all` (places that share parameters), and, where its
    start depends on the model, `initialize`.

    Attributes:
        name: its key in `METHODS`, in recipes and in saved files.
        title: its name for people.
        paper: where it was published.
        site: where its deltas act.
        head_learning_rate: of a new task head; None: as the rest.
        learning_rates: AdamW's rate to start from, for an "encoder" (22-125 M) and a "decoder" (100 M-1 B).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[Site] = "layer"
    learning_rates: ClassVar[dict[str, float]]
    head_learning_rate: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            allowed = get_args(hint) or (hint,)
            if float in allowed and type(value) is int:
                continue
            if type(value) not in allowed:
                names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
                raise ValueError(f"{self.title}'s {field.name} must be {names}, got {value!r}.")
        self.check()

    def check(self) -> None:
        """Raise a ValueError that names the field, unless the values, which have their types, are sensible."""

    def places(self, model: PreTrainedModel) -> list[Place]:
        """Where this technique's deltas go."""
        from smidgen import attention, targets

        layers = getattr(self, "layers", "all")
        if self.site == "attention":
            return attention.find(model, layers)
        if self.site == "embedding":
            return [targets.embedding(model)]
        return targets.find(model, getattr(self, "targets", None), layers)

    def build(self, place: Place) -> Delta:
        """The delta for one place, on the current default device."""
        raise NotImplementedError

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas for all places, in their order."""
        return [self.build(place) for place in places]

    def initialize(
        self, model: PreTrainedModel, deltas: Sequence[Delta], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Set starting values that depend on the model; the deltas are built but not yet in it."""

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """Names of the model's own parameters that this technique trains beside its deltas."""
        return []

    def folded(self) -> Method:
        """The method whose deltas hold what `Delta.folded` gives."""
        return self

    @property
    def virtual_tokens(self) -> int:
        """How many positions the technique takes from the text."""
        return 0

    def summary(self) -> str:
        """The hyperparameters on one line, for people."""
        return ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        )


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter in the number format of the activations, so that inputs are never copied to the parameter's."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


def check_share(technique: str, field: str, value: float) -> None:
    """Raise a ValueError unless `value` is a probability below 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{technique}'s {field} must be at least 0 and below 1, got {value}.")


def check_positive(technique: str, field: str, value: float) -> None:
    """Raise a ValueError unless `value` is at least 1 for an integer, or above 0 for a float."""
    if not 0 < value < math.inf:
        least = "at least 1" if isinstance(value, int) else "above 0"
        raise ValueError(f"{technique}'s {field} must be {least}, got {value}.")


def add_to_weight(weight: nn.Parameter, update: Tensor) -> None:
    """Weight += update, summed in fp32 at least, so that merging rounds once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        weight.copy_((weight.to(wide) + update.to(wide)).to(weight.dtype))
