"""Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., 2023, arXiv:2306.07280.

OFT: each weight is multiplied by a block-diagonal orthogonal matrix, so that the angles between its neurons stay
(section 3). A block is Cayley's transform of a skew matrix, (I + Q)(I - Q)⁻¹, and Q starts at zero: the identity. The
rotation is applied to the layer's input, W (R x), which never builds a weight, as in OFTv2 (Qiu et al., 2025,
arXiv:2506.19847, section 3); unless `terms` says otherwise, the inverse is exact, where OFTv2 sums the first terms of
its series.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen import targets
from smidgen.delta import Delta, Method, cast, check_positive, without_autocast
from smidgen.layers import set_weight, weight_matrix
from smidgen.targets import Place, check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Learns a rotation of each targeted layer's input, in blocks: W R x.

    Args:
        block_size: the side of R's blocks; it must divide the layer's input size.
        terms: how many terms of the inverse's series are summed, as OFTv2 does (5 in peft); None: the exact inverse.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `block_size` or `terms` is below 2, or `block_size` does not divide a layer's input size.
    """

    name = "oft"
    title = "OFT"
    paper = "arXiv:2306.07280"
    learning_rates: ClassVar = {"encoder": 1.5e-3, "decoder": 2e-4}

    block_size: int = 32
    terms: int | None = None
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "block_size", self.block_size)
        if self.block_size < 2:
            raise ValueError(f"{self.title}'s block_size must be at least 2, a rotation's; got {self.block_size}.")
        if self.terms is not None and self.terms < 2:
            raise ValueError(
                f"{self.title}'s terms must be at least 2, since the first is the identity alone, or None; got "
                f"{self.terms}."
            )
        check_linear(self.title, self.targets)

    def places(self, model: PreTrainedModel) -> list[Place]:
        """The inputs of the layers."""
        return targets.inputs(model, self.targets, self.layers)

    def build(self, place: Place) -> OFTDelta:
        """The rotation of one layer's input."""
        if place.shape[0] % self.block_size:
            raise ValueError(
                f"{self.title}'s block_size {self.block_size} does not divide the input of {place.name}, "
                f"{place.shape[0]}. Choose a divisor of it."
            )
        return OFTDelta(place.shape[0] // self.block_size, self.block_size, self.terms)


class OFTDelta(Delta):
    """One layer's rotation; `skew` (blocks, size (size - 1) / 2) holds the entries above each Q's diagonal."""

    def __init__(self, blocks: int, size: int, terms: int | None) -> None:
        super().__init__()
        self.size, self.terms = size, terms
        self.skew = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))

    def rotations(self) -> Tensor:
        """The blocks of Rᵀ, (blocks, size, size), in fp32, as rows of inputs are multiplied by."""
        return self.turns() + torch.eye(self.size, device=self.skew.device)

    def turns(self) -> Tensor:
        """The same less the identity, so that a small rotation is not lost in a format of few digits."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.skew.device)
        upper = self.skew.new_zeros(len(self.skew), self.size, self.size, dtype=torch.float32)
        upper = upper.index_put((torch.arange(len(self.skew))[:, None], rows, columns), self.skew.float())
        q, identity = upper - upper.mT, torch.eye(self.size, device=upper.device)
        with without_autocast(q):
            if self.terms is not None:
                return self._series(q)
            blocks: Tensor = torch.linalg.solve(identity + q, -2 * q, left=False)  # (I - Q)(I + Q)⁻¹ - I
        return blocks

    def _series(self, q: Tensor) -> Tensor:
        """2 Q + 2 Q² + ... + Qⁿ, terms of (I + Q)(I - Q)⁻¹ after I, as peft sums them: Q is -Q here."""
        total, power = torch.zeros_like(q), torch.eye(self.size, device=q.device)
        for term in range(1, self.terms or 0):
            power = power @ q
            total = total + power * (1.0 if term > 2 and term == (self.terms or 0) - 1 else 2.0)
        return total

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's input, and the result: (..., in)."""
        turns = cast(self.turns(), hidden)
        return hidden + torch.einsum("...bi,bij->...bj", hidden.unflatten(-1, turns.shape[:2]), turns).flatten(-2)

    def merge(self, layer: nn.Module) -> None:
        """W becomes W R, in fp32."""
        weight, blocks = weight_matrix(layer).float(), self.rotations()
        set_weight(layer, torch.einsum("obi,bji->obj", weight.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2))
