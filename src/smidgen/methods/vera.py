"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., 2023, arXiv:2310.11454.

All layers share one frozen random pair A, B; a layer learns two vectors that scale their rows:
W x + b ⊙ B (d ⊙ A x) (section 3.1, equation 2). A and B are Kaiming uniform, d starts at 0.1 and b at zero (section
3.3). A layer smaller than the largest uses the first rows and columns. A and B are not saved: they follow from `seed`,
and their SHA-256 stands in the saved file, so that another random generator is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, check_positive, check_share, dropped
from smidgen.methods.low_rank import add_product
from smidgen.targets import Place, check_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Learns two vectors a layer that scale random matrices shared by all: W + diag(b) B diag(d) A.

    Args:
        rank: r, the rows of A; at least 1. It may be above the layer's size.
        d_initial: what every number of d starts at.
        seed: of A and B; None: they are saved beside the vectors, as where they came from elsewhere.
        digest: the SHA-256 of A and B, in a saved adapter; None: not checked.
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range, or A and B are not those of `digest`.
    """

    name = "vera"
    title = "VeRA"
    paper = "arXiv:2310.11454"
    learning_rates: ClassVar = {"encoder": 0.022, "decoder": 3e-3}

    rank: int = 256
    d_initial: float = 0.1
    seed: int | None = 0
    digest: str | None = None
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "rank", self.rank)
        check_positive(self.title, "d_initial", float(self.d_initial))
        check_share(self.title, "dropout", self.dropout)
        check_linear(self.title, self.targets)

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas of all layers, around one pair of matrices as large as the largest layer."""
        shared = Projections(
            max(place.shape[0] for place in places), max(place.shape[1] for place in places), self.rank, self.seed
        )
        if self.digest not in (None, shared.digest):
            raise ValueError(
                f"{self.title}'s matrices drawn with seed={self.seed} are not those that it was trained with (their "
                "SHA-256 differs): another version of torch draws other numbers."
            )
        return [VeRADelta(shared, *place.shape, method=self) for place in places]

    def folded(self, deltas: Sequence[Delta]) -> VeRA:
        """With the matrices' SHA-256."""
        assert isinstance(deltas[0], VeRADelta)
        return self if self.seed is None else dataclasses.replace(self, digest=deltas[0].shared.digest)


class Projections(nn.Module):
    """The frozen pair: `a` (rank, in) and `b` (out, rank), of the largest layer; they follow from the seed."""

    a: Tensor
    b: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, seed: int | None) -> None:
        super().__init__()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        a, b = torch.empty(rank, in_features, device="cpu"), torch.empty(out_features, rank, device="cpu")
        for matrix in (a, b):
            nn.init.kaiming_uniform_(matrix, generator=generator)
        self.digest = hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()
        device = torch.get_default_device()
        if device.type == "meta" and seed is not None:
            device = torch.device("cpu")  # an adapter that is read gets its tensors from the file, except these
        self.register_buffer("a", a.to(device), persistent=seed is None)
        self.register_buffer("b", b.to(device), persistent=seed is None)


class VeRADelta(Delta):
    """One layer's vectors: `d` (rank,) scales A's rows, `b` (out,) those of B."""

    def __init__(self, shared: Projections, in_features: int, out_features: int, *, method: VeRA) -> None:
        super().__init__()
        self.shared = shared
        self.in_features, self.out_features = in_features, out_features
        self.d = nn.Parameter(torch.full((method.rank,), float(method.d_initial)))
        self.b = nn.Parameter(torch.zeros(out_features))  # zero: training starts from the base model
        self.dropout = method.dropout

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x = inputs[0]
        x = dropped(x, self.dropout, self.training)
        low = functional.linear(x, cast(self.shared.a[:, : self.in_features], x)) * cast(self.d, x)
        b = self.shared.b[: self.out_features] * self.b[:, None]
        return add_product(layer, hidden, low, cast(b, x), 1.0)

    def update(self) -> Tensor:
        """diag(b) B diag(d) A, (out, in), in fp32."""
        a, b = self.shared.a[:, : self.in_features].float(), self.shared.b[: self.out_features].float()
        return (self.b.float()[:, None] * b) @ (self.d.float()[:, None] * a)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """The random matrices with their rows scaled."""
        a, b = self.shared.a[:, : self.in_features], self.shared.b[: self.out_features]
        return self.d[:, None] * a, self.b[:, None] * b, 1.0
