"""The two words a technique is written in: `Method`, its hyperparameters, and `Delta`, what it trains at one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    def __init__(self, layer: nn.Module) -> None:
        self.inputs: tuple[Any, ...] | None = None
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remember the layer's positional arguments."""
        self.inputs = inputs

    def take(self) -> tuple[Any, ...]:
        """What went in since the last call."""
        inputs, self.inputs = self.inputs, None
        if inputs is None:
            raise RuntimeError("A sublayer's end ran without its start; the model does not call its layers in order.")
        return inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The hyperparameters of one technique, and how it builds its deltas.

    A technique overrides `build` (one place) or `build_all` (places that share parameters), and, where its start
    depends on the model, `initialize`.

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
    if value <= 0 or (isinstance(value, int) and value < 1):
        least = "at least 1" if isinstance(value, int) else "above 0"
        raise ValueError(f"{technique}'s {field} must be {least}, got {value}.")


def add_to_weight(weight: nn.Parameter, update: Tensor) -> None:
    """Weight += update, summed in fp32 at least, so that merging rounds once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        weight.copy_((weight.to(wide) + update.to(wide)).to(weight.dtype))
