"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., 2021, arXiv:2005.00247.

The second of its two steps (section 3.2): the adapters of several tasks stay as they were trained, and every block
learns to attend to them. The query is the block's output h, the keys and values are what each adapter adds to it, z_n:
h + Σ_n softmax_n(Q h · K z_n) V z_n, for every token by itself. V starts as the identity, as the paper's does, and Q
and K near zero, so that training starts from the adapters' mean. Where we differ: no penalty holds V near the identity.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen import files, manifest, storage
from smidgen.delta import Delta, Method, cast
from smidgen.errors import UserError
from smidgen.methods.bottleneck import NONLINEARITIES, BottleneckDelta, reduced
from smidgen.methods.pfeiffer import Pfeiffer
from smidgen.stacking import adapters
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Learns, for every token, how much to take of several Pfeiffer adapters, which stay as they are.

    Their numbers are copied, so that the saved adapter needs nothing but the model; their heads are left behind.

    Args:
        adapters: two or more, separated by commas: names of adapters on the model, folders of saved ones, or
            outputs of runs.
        reduction: theirs: the hidden size over the bottlenecks' width.
        nonlinearity: theirs.

    Raises:
        ValueError: fewer than two are named, or a value is outside its range; when attached, one of them is no Pfeiffer
            adapter with these options on every block, or trained more of the model than its head.
        UserError: a folder is damaged or is no adapter for the model.
    """

    name = "adapter-fusion"
    title = "AdapterFusion"
    paper = "arXiv:2005.00247"
    learning_rates: ClassVar = {"encoder": 1e-3, "decoder": 1e-4}

    adapters: str = ""
    reduction: int = 16
    nonlinearity: str = "relu"

    @property
    def members(self) -> list[str]:
        """The names and folders."""
        return [member.strip() for member in self.adapters.split(",") if member.strip()]

    @property
    def member(self) -> Pfeiffer:
        """The technique that each of them is of."""
        return Pfeiffer(reduction=self.reduction, nonlinearity=self.nonlinearity)

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        if len(self.members) < 2:
            raise ValueError(
                f"{self.title}'s adapters must name two trained adapters or more, separated by commas, such as "
                f"'runs/a/adapter, runs/b/adapter'; got {self.adapters!r}."
            )
        if len({Path(member).absolute() for member in self.members}) < len(self.members):
            raise ValueError(f"{self.title}'s adapters={self.adapters!r} hold one of them twice.")
        self.member.check()

    def anchored(self, folder: Path) -> AdapterFusion:
        """With its folders taken from this one; a member without a slash may be an adapter's name."""
        members = [
            os.path.normpath(folder / member) if "/" in member or (folder / member).is_dir() else member
            for member in self.members
        ]
        return dataclasses.replace(self, adapters=", ".join(members))

    def contents(self) -> dict[str, str]:
        """The hashes of its adapters, as their folders have them."""
        held = [manifest.folder_of(Path(member)) / manifest.FILE for member in self.members]
        return {"adapters": ", ".join(files.sha256(path) if path.is_file() else str(path.parent) for path in held)}

    def places(self, model: PreTrainedModel) -> list[Place]:
        """Every block."""
        return self.member.places(model)

    def build(self, place: Place) -> FusionDelta:
        """The delta at the end of one block."""
        width = place.shape[1]
        size = reduced(width, self.reduction)
        return FusionDelta(width, size=size, count=len(self.members), nonlinearity=self.nonlinearity)

    def initialize(
        self,
        model: PreTrainedModel,
        places: Sequence[Place],
        deltas: Sequence[Delta],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Copy the members' numbers."""
        for number, member in enumerate(self.members):
            found = self._find(model, member)
            if found.keys() != {place.name for place in places}:
                raise ValueError(f"{self.title} needs adapters on every block, and {member!r} leaves some out.")
            for place, delta in zip(places, deltas, strict=True):
                assert isinstance(delta, FusionDelta)
                delta.copy(number, found[place.name])

    def _find(self, model: PreTrainedModel, member: str) -> dict[str, BottleneckDelta]:
        """A member's deltas by the names of their places."""
        if member in adapters(model):
            adapter = adapters(model)[member]
            methods, places, deltas = adapter.methods, adapter.places, adapter.deltas
            more = adapter.own_names - adapter.head_names
        elif Path(member).is_dir():
            saved = storage.read(model, manifest.folder_of(Path(member)), head=False)
            methods, places, deltas, more = tuple(saved.methods), saved.places, saved.deltas, frozenset(saved.own)
        else:
            raise UserError(
                f"{self.title}'s adapters={self.adapters!r}: {member!r} is neither an adapter on the model nor the "
                f"folder of one. On the model: {', '.join(adapters(model)) or 'none'}."
            )
        (method, *rest) = methods
        if rest or not isinstance(method, Pfeiffer):
            raise ValueError(f"{self.title} fuses Pfeiffer adapters, and {member!r} is {_titles(methods)}.")
        for field in ("reduction", "nonlinearity"):
            if getattr(method, field) != getattr(self, field):
                raise ValueError(
                    f"{self.title}'s {field}={getattr(self, field)!r}, and {member!r} has {getattr(method, field)!r}. "
                    f"Give {field}={getattr(method, field)!r}; all of them must have the same."
                )
        if more:
            raise ValueError(f"{member!r} trained {min(more)} of the model beside its adapters, which cannot be fused.")
        return {
            place.name: delta
            for place, delta in zip(places[0], deltas[0], strict=True)
            if isinstance(delta, BottleneckDelta)
        }

    def folded(self, deltas: Sequence[Delta]) -> AdapterFusion:
        """With as much of the folders' names as tells them apart: where they lay is no part of the adapter."""
        parts = [Path(member).absolute().parts for member in self.members]
        shown = next(n for n in range(1, 1 + max(map(len, parts))) if len({own[-n:] for own in parts}) == len(parts))
        return dataclasses.replace(self, adapters=", ".join("/".join(own[-shown:]) for own in parts))


def _titles(methods: Sequence[Method]) -> str:
    return " + ".join(method.title for method in methods)


class FusionDelta(Delta):
    """One block's members, (count, ...) each, which are not trained, and the attention to them, which is.

    Args:
        width: the hidden size.
        size: the bottlenecks' width.
        count: how many members.
        nonlinearity: theirs.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def __init__(self, width: int, *, size: int, count: int, nonlinearity: str) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width) * 0.02)
        self.key = nn.Parameter(torch.randn(width, width) * 0.02)
        self.value = nn.Parameter(torch.eye(width))
        self.register_buffer("down", torch.zeros(count, size, width))
        self.register_buffer("down_bias", torch.zeros(count, size))
        self.register_buffer("up", torch.zeros(count, width, size))
        self.register_buffer("up_bias", torch.zeros(count, width))
        self.nonlinearity = nonlinearity

    def copy(self, number: int, member: BottleneckDelta) -> None:
        """Take over a member's numbers."""
        self.down[number], self.down_bias[number] = member.down.weight, member.down.bias
        self.up[number], self.up_bias[number] = member.up.weight, member.up.bias

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the block's output, and the result: (..., width)."""
        low = functional.linear(hidden, cast(self.down.flatten(0, 1), hidden), cast(self.down_bias.flatten(), hidden))
        low = NONLINEARITIES[self.nonlinearity](low).unflatten(-1, self.down_bias.shape)
        added = torch.einsum("...ns,nws->...nw", low, cast(self.up, hidden)) + cast(self.up_bias, hidden)
        query = functional.linear(hidden, cast(self.query, hidden)) @ cast(self.key, hidden)  # q · K z = (Kᵀ q) · z
        shares = torch.einsum("...w,...nw->...n", query, added).softmax(-1)
        mixed = torch.einsum("...n,...nw->...w", shares, added)  # V is linear: of the mixture, once a token
        return hidden + functional.linear(mixed, cast(self.value, hidden))
