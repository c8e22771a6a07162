"""The two words a technique is written in: `Method`, its hyperparameters, and `Delta`, what it trains at one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from smidgen.layers import add_to_weight

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smidgen.adapter import Adapter
    from smidgen.hooks import Route, Tap
    from smidgen.targets import Place

Site = Literal["layer", "attention", "embedding"]
"""Where a delta acts: on a layer's output or input, on the keys and values of an attention, on the input embedding."""

Side = Literal["output", "input"]
"""What of a layer a delta changes."""


@dataclasses.dataclass
class Service:
    """What an adapter does now: its deltas share it, so that a switch need not go through them.

    Attributes:
        active: whether the deltas act.
        trains: whether what is trained trains while they do.
        order: of several adapters that are active, those of a lower one act first.
        route: which rows of a batch they serve; None: all.
    """

    active: bool = True
    trains: bool = True
    order: int = 0
    route: Route | None = None


class Delta(nn.Module):
    """What a technique trains at one place: a forward hook with parameters. It acts while its service is active.

    `forward` depends on its place's site:

    - layer: `forward(layer, inputs, hidden) -> hidden`, with `inputs` the layer's positional arguments, or, if
      `reads_source`, those of the layer at the start of the sublayer that this one ends, and `hidden` the layer's
      output, or its first input where the place's side is "input";
      `hidden` may be changed in place where `layers.output_is_ours` says so, and so may what it returns, by the next;
      what it does to a token depends on that token alone;
    - attention: `forward(batch) -> (keys, values)`, each (batch, key-value heads, virtual tokens, head size); where it
      is `gated`, they have a softmax of their own, whose result is multiplied by the gate and added;
    - embedding: `forward(embedding) -> prompt`, (virtual tokens, hidden size), with `embedding` the input embedding.
    """

    service: Service = Service()
    side: Side | None = None
    reads_source: bool = False
    virtual_tokens: int = 0
    tap: Tap | None = None

    def train(self, mode: bool = True) -> Self:
        """As for any module; the delta of a frozen adapter computes as it is served, while another trains above it."""
        return super().train(mode and self.service.trains)

    @property
    def active(self) -> bool:
        """Whether it acts now."""
        return self.service.active

    @property
    def route(self) -> Route | None:
        """Which rows of a batch it serves; None: all."""
        return self.service.route

    def gated(self, query: Tensor) -> Tensor | None:
        """The gate of an attention's own softmax for the keys and values, or None if they join the text's.

        Args:
            query: (batch, heads, queries, head size).

        Returns:
            What multiplies (batch, queries, heads, head size).
        """
        return None

    def gate_value(self) -> Tensor | None:
        """How far a learned gate is open, (1,), at a token of zeros where it reads tokens; None: there is no gate."""
        return None

    def update(self) -> Tensor:
        """What the delta adds to a linear layer's weight, (out, in), in fp32; only techniques that do so have it."""
        raise NotImplementedError

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """A (rank, in), B (out, rank) and s of an update s · B A; only techniques of low rank have them."""
        raise NotImplementedError

    @property
    def low_rank(self) -> bool:
        """Whether the update has `low_rank_factors`."""
        return type(self).low_rank_factors is not Delta.low_rank_factors

    def joins(self) -> bool:
        """Whether `forward` adds now what `low_rank_factors` say, and nothing else."""
        return False

    def merge(self, layer: nn.Module) -> None:
        """Write the delta into the weight of `layer`, in fp32; only techniques that change a weight can."""
        add_to_weight(layer, self.update())

    @property
    def mergeable(self) -> bool:
        """Whether the delta is a change of its layer's weight."""
        return type(self).update is not Delta.update or type(self).merge is not Delta.merge

    def folded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors that inference needs; a technique with a reparameterization gives its result.

        One that several deltas share is the same object in each, and is saved once.
        """
        return dict(self.state_dict(keep_vars=True))

    def kept(self) -> dict[str, Tensor]:
        """What training goes on from beside the parameters, such as a schedule's averages."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The hyperparameters of one technique, and how it builds its deltas.

    Its fields are plain values: bool, int, float, str or None. A technique overrides `check`, `build` (one place) or
    `build_all` (places that share parameters), and, where its start depends on the model, `initialize`.

    Attributes:
        name: its key in `METHODS`, in recipes and in saved files.
        title: its name for people.
        paper: where it was published.
        site: where its deltas act, unless `places` says otherwise.
        needs_plain_output: whether its deltas must be the first on a layer's output, whose weight they read.
        head_learning_rate: of the task head, which is learned with any technique; None: as the rest.
        learning_rates: AdamW's rate to start from, for an "encoder" (22-125 M) and a "decoder" (100 M-1 B).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[Site] = "layer"
    learning_rates: ClassVar[dict[str, float]]
    needs_plain_output: ClassVar[bool] = False
    head_learning_rate: ClassVar[float | None] = 2e-3

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
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Set starting values that depend on the model; the deltas are built but not yet in it."""

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """Names of the model's own parameters that this technique trains beside its deltas."""
        return []

    def anchored(self, folder: Path) -> Method:
        """With the paths among its options, if there are any, taken from this folder."""
        return self

    def folded(self, deltas: Sequence[Delta]) -> Method:
        """The method whose deltas hold what `Delta.folded` gives of these."""
        return self

    def contents(self) -> dict[str, str]:
        """What the files that its options name hold, where their names do not decide: by option."""
        return {}

    def rate_ratio(self, model: PreTrainedModel, parameter: str) -> float:
        """The learning rate of a parameter, by its name in `Adapter.named_parameters`, over the adapter's or head's."""
        return 1.0

    def before_step(self, adapter: Adapter, deltas: Sequence[Delta], optimizer: Optimizer) -> None:
        """Hear that an optimizer is about to step; the gradients are there."""

    def schedule(self, adapter: Adapter, deltas: Sequence[Delta]) -> None:
        """Put the deltas in their state at `adapter.clock.step`; called when attached and after every step."""

    def is_settled(self, adapter: Adapter, deltas: Sequence[Delta]) -> bool:
        """Whether a schedule has come to what was asked for, so that the epoch may be the one that is kept."""
        return True

    @property
    def keeps_base(self) -> bool:
        """Whether the originals of the model's own parameters that are trained are kept."""
        return True

    @property
    def virtual_tokens(self) -> int:
        """How many positions the technique takes from the text."""
        return 0

    def resized(self, option: str, size: int) -> dict[str, Any]:
        """The options with another size, such as a rank, whose alpha grows with it, so that the update's scale stays.

        Args:
            option: the one that says the size.
            size: its new value.
        """
        alpha: float | None = getattr(self, "alpha", None) if option == "rank" else None
        return {option: size} | ({} if alpha is None else {"alpha": alpha * size / getattr(self, option)})

    def summary(self) -> str:
        """The hyperparameters on one line, for people."""
        return ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        )


def dropped(inputs: Tensor, probability: float, training: bool) -> Tensor:
    """As `functional.dropout`, which keeps as many numbers as there are inputs for the backward pass; here bytes."""
    return torch.native_dropout(inputs, probability, True)[0] if training and probability else inputs


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter in the number format of the activations, so that inputs are never copied to the parameter's."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


def without_autocast(parameter: Tensor) -> torch.autocast:
    """A context in which what is computed of parameters keeps their own number format."""
    return torch.autocast(parameter.device.type, enabled=False)


def check_share(technique: str, field: str, value: float) -> None:
    """Raise a ValueError unless `value` is a probability below 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{technique}'s {field} must be at least 0 and below 1, got {value}.")


def check_positive(technique: str, field: str, value: float) -> None:
    """Raise a ValueError unless `value` is at least 1 for an integer, or above 0 for a float."""
    if not 0 < value < math.inf:
        least = "at least 1" if isinstance(value, int) else "above 0"
        raise ValueError(f"{technique}'s {field} must be {least}, got {value}.")
