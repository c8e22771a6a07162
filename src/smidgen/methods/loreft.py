"""ReFT: Representation Finetuning for Language Models. Wu et al., 2024, arXiv:2404.03592.

LoReFT edits the residual stream in a subspace: h + Rᵀ (W h + b - R h), with the rows of R orthonormal (section 3.2,
equation 2). Where we differ: every position is edited, not the first and last few of a prompt (section 3.3); W starts
as R and b at zero, so that training starts from the base model, where the authors' code draws W; and R is the
orthonormal factor of a free matrix (QR), where theirs is a parametrization of torch's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, check_positive
from smidgen.methods.low_rank import check_rank
from smidgen.targets import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoReFT(Method):
    """Learns an edit of every block's output in a subspace: h + Rᵀ (W h + b - R h).

    Args:
        rank: r, the subspace's dimension; from 1 to the hidden size.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: `rank` is below 1 or above the hidden size.
    """

    name = "loreft"
    title = "LoReFT"
    paper = "arXiv:2404.03592"
    targets = "blocks"
    learning_rates: ClassVar = {"encoder": 1.8e-3, "decoder": 9e-4}

    rank: int = 4
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "rank", self.rank)

    def build(self, place: Place) -> LoReFTDelta:
        """The edit at the end of one block."""
        check_rank(self.title, self.rank, place)
        return LoReFTDelta(place.shape[1], rank=self.rank)


class LoReFTDelta(Delta):
    """One block's edit; `subspace` (rank, width) spans R's rows, `weight` is (rank, width) and `bias` (rank,)."""

    def __init__(self, width: int, *, rank: int) -> None:
        super().__init__()
        start = torch.randn(rank, width)
        self.subspace = nn.Parameter(start)
        self.weight = nn.Parameter(start.clone() if start.is_meta else orthonormal(start))
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the block's output, and the result: (..., width)."""
        r = orthonormal(self.subspace)
        edit = functional.linear(hidden, cast(self.weight - r, hidden), cast(self.bias, hidden))
        return hidden + functional.linear(edit, cast(r.T, hidden))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, (rank, width), in fp32; the same rows where they are so already."""
    q, r = torch.linalg.qr(rows.float().T)
    signed: Tensor = q * r.diagonal().sign()
    return signed.T
