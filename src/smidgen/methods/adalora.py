"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., 2023, arXiv:2303.10512.

The update has the form of an SVD, P diag(e) Q, and starts with a rank above the one wanted (section 3.1). While it is
trained, each triplet of a column, a number and a row gets an importance: smoothed sensitivity |weight · gradient| times
its uncertainty (equations 7 to 11). A budget that falls from the start rank to the target (appendix A, equation 12)
keeps the most important triplets of all layers together and sets the others' e to zero, from which they may come back
until the last look (section 3.3); a saved adapter has only those that are left, so that its rank really differs from
layer to layer. P and Q are pulled towards orthonormality (equation 4).

It hears of every optimizer step by itself; in a loop of your own, set `adapter.clock.steps`. The pull is that of the
authors' code: a mean of norms over all matrices, where equation 4 has a sum of squares. Where we differ from both: its
gradient is added when the optimizer steps, once whatever the number of micro-batches, and so after a clipping of
gradients; it has no part in the importances, which are the task's alone; the update is scaled by alpha over the target
rank; and the schedule's lengths are shares of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, check_positive, check_share, dropped
from smidgen.methods.low_rank import add_product, check_low_rank, check_rank
from smidgen.targets import Place

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Learns low-rank updates whose ranks are shared out among the layers while training: W + s P diag(e) Q.

    Args:
        rank: the mean rank at the end.
        start_rank: the rank of every layer at the start.
        alpha: s is alpha / rank.
        beta: smoothing of sensitivity and uncertainty (β1 = β2 in section 3.2).
        orthogonality: γ, weight of the pull towards orthonormal P and Q: of the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖.
        warmup: share of the steps before the budget falls (t_i in equation 12).
        final: share of the steps at the end, when the budget stays (t_f).
        interval: steps between two looks at the importances (ΔT).
        dropout: probability of dropping an input of the update while training.
        targets: which linear layers, as a role or a name pattern.
        layers: which blocks: "all", "last:4", "0-3", "0,5".
        ranks: the layers' ranks in a saved adapter, "8,0,12"; None: the schedule finds them.

    Raises:
        ValueError: a value is outside its range, or `ranks` does not fit the layers.
        RuntimeError: at the first step, if nothing says how many steps there will be.
    """

    name = "adalora"
    title = "AdaLoRA"
    paper = "arXiv:2303.10512"
    learning_rates: ClassVar = {"encoder": 7.2e-3, "decoder": 5e-4}

    rank: int = 8
    start_rank: int = 12
    alpha: float = 16.0
    beta: float = 0.85
    orthogonality: float = 0.1
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10
    dropout: float = 0.0
    targets: str = "all-linear"
    layers: str = "all"
    ranks: str | None = None

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_low_rank(self.title, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)
        check_positive(self.title, "interval", self.interval)
        for field in ("beta", "warmup", "final"):
            check_share(self.title, field, getattr(self, field))
        if self.start_rank < self.rank:
            raise ValueError(f"{self.title}'s start_rank must be at least rank={self.rank}, got {self.start_rank}.")
        if self.warmup + self.final >= 1:
            raise ValueError(
                f"{self.title}'s warmup and final leave no step between them; got {self.warmup} and {self.final}."
            )
        if not 0 <= self.orthogonality < math.inf:
            raise ValueError(f"{self.title}'s orthogonality must be at least 0, got {self.orthogonality}.")

    def resized(self, option: str, size: int) -> dict[str, Any]:
        """The options with another mean rank; the rank at the start grows with it."""
        more = {"start_rank": math.ceil(self.start_rank * size / self.rank)} if option == "rank" else {}
        return super().resized(option, size) | more

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas of all layers, with the start rank or, saved, the one that was found for each."""
        ranks = [self.start_rank] * len(places)
        if self.ranks is not None:
            ranks = [int(rank) for rank in self.ranks.split(",") if rank.isdigit()]
            if len(ranks) != len(places):
                raise ValueError(f"{self.title}'s ranks={self.ranks!r} are not {len(places)} numbers, one a layer.")
        for place, rank in zip(places, ranks, strict=True):
            check_rank(self.title, rank, place)
        scale, is_found = self.alpha / self.rank, self.ranks is not None
        return [
            AdaLoRADelta(*place.shape, rank=rank, scale=scale, dropout=self.dropout, scored=not is_found)
            for place, rank in zip(places, ranks, strict=True)
        ]

    @torch.no_grad()
    def before_step(self, adapter: Adapter, deltas: Sequence[Delta], optimizer: Optimizer) -> None:
        """Smooth the importances, then add the orthogonality's gradient."""
        found = _adalora(deltas)
        for delta in found:
            if self.ranks is None:
                delta.score(self.beta)
            delta.pull(self.orthogonality / (2 * len(found)))

    @torch.no_grad()
    def schedule(self, adapter: Adapter, deltas: Sequence[Delta]) -> None:
        """Keep the most important triplets of all layers together, as many as the budget has."""
        clock, found = adapter.clock, _adalora(deltas)
        if self.ranks is not None or clock.step == 0:
            return
        done = clock.share(self.title)
        is_final, is_look = self.is_settled(adapter, deltas), clock.step % self.interval == 0
        if is_final and sum(int(delta.mask.sum()) for delta in found) != self.rank * len(found):
            _prune(found, self.rank * len(found))
        elif is_look and self.warmup <= done and not is_final:
            _prune(found, self.budget(done, len(found)))
        if is_look or is_final:
            for delta in found:
                delta.e.mul_(delta.mask)

    def is_settled(self, adapter: Adapter, deltas: Sequence[Delta]) -> bool:
        """Whether the budget has fallen: before, the ranks are more than were asked for."""
        return self.ranks is not None or adapter.clock.share(self.title) >= 1 - self.final

    def budget(self, done: float, layers: int) -> int:
        """How many triplets all layers have after a share of the steps (equation 12)."""
        start, end = self.start_rank * layers, self.rank * layers
        left = 1 - (done - self.warmup) / (1 - self.warmup - self.final)
        return round(end + (start - end) * min(1.0, max(0.0, left)) ** 3)

    def folded(self, deltas: Sequence[Delta]) -> AdaLoRA:
        """With the ranks that the layers have now."""
        return dataclasses.replace(self, ranks=",".join(str(int(delta.left().sum())) for delta in _adalora(deltas)))


def _adalora(deltas: Sequence[Delta]) -> list[AdaLoRADelta]:
    return [delta for delta in deltas if isinstance(delta, AdaLoRADelta)]


def _prune(deltas: Sequence[AdaLoRADelta], budget: int) -> None:
    """Keep as many of the most important triplets as the budget has."""
    scores = torch.cat([delta.importance() for delta in deltas])
    kept = torch.zeros_like(scores)
    kept[scores.topk(budget).indices] = 1.0
    for delta, mask in zip(deltas, kept.split([len(delta.e) for delta in deltas]), strict=True):
        delta.mask.copy_(mask)


class AdaLoRADelta(Delta):
    """One layer's update; `p` is (out, rank), `e` (rank,) and `q` (rank, in); `mask` (rank,) is 1 for triplets kept.

    Args:
        in_features: of the layer.
        out_features: of the layer.
        rank: of the update.
        scale: multiplies the update.
        dropout: probability of dropping an input of the update while training.
        scored: whether the triplets' importances are kept.
    """

    mask: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, scale: float, dropout: float, scored: bool
    ) -> None:
        super().__init__()
        self.p = nn.Parameter(0.02 * torch.randn(out_features, rank))
        self.e = nn.Parameter(torch.zeros(rank))  # zero: training starts from the base model
        self.q = nn.Parameter(0.02 * torch.randn(rank, in_features))
        self.scale, self.dropout, self.scored = scale, dropout, scored
        self.register_buffer("mask", torch.ones(rank, device=None if scored else "cpu"), persistent=False)
        if scored:
            for name, parameter in list(self.named_parameters()):
                self.register_buffer(f"{name}_sensitivity", torch.zeros_like(parameter), persistent=False)
                self.register_buffer(f"{name}_uncertainty", torch.zeros_like(parameter), persistent=False)

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Inputs: one (..., in); hidden, the layer's output, and the result: (..., out)."""
        x = inputs[0]
        x = dropped(x, self.dropout, self.training)
        return add_product(layer, hidden, functional.linear(x, cast(self.q, x)), cast(self.p * self.e, x), self.scale)

    def update(self) -> Tensor:
        """Scale · P diag(e) Q, (out, in), in fp32."""
        return self.scale * (self.p.float() * self.e.float()) @ self.q.float()

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """The triplets that are left; one of zeros where none is, since no rank is 0."""
        left = self.left()
        if not bool(left.any()):
            return self.q.new_zeros(1, self.q.shape[1]), self.p.new_zeros(self.p.shape[0], 1), self.scale
        return self.q[left], (self.p * self.e)[:, left], self.scale

    def pull(self, weight: float) -> None:
        """Add the gradient of weight · (‖Pᵀ P - I‖ + ‖Q Qᵀ - I‖)."""
        identity = torch.eye(len(self.e), device=self.e.device, dtype=self.e.dtype)
        for parameter, rows in ((self.p, self.p.T), (self.q, self.q)):
            if parameter.grad is not None:
                off = rows @ rows.T - identity
                gradient = 2 * off @ rows / off.norm().clamp_min(torch.finfo(off.dtype).tiny)
                parameter.grad.add_(gradient if rows is parameter else gradient.T, alpha=weight)

    def score(self, beta: float) -> None:
        """Smooth each number's sensitivity |weight · gradient| and uncertainty (equations 9 and 10)."""
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                now = (parameter * parameter.grad).abs()
                sensitivity, uncertainty = (getattr(self, f"{name}_{what}") for what in ("sensitivity", "uncertainty"))
                sensitivity.lerp_(now, 1 - beta)
                uncertainty.lerp_((now - sensitivity).abs(), 1 - beta)

    def importance(self) -> Tensor:
        """Of each triplet, (rank,): its e's score and the mean scores of its column and row (equations 7 and 11)."""
        p, e, q = (getattr(self, f"{n}_sensitivity") * getattr(self, f"{n}_uncertainty") for n in ("p", "e", "q"))
        total: Tensor = e + p.mean(0) + q.mean(1)
        return total

    def kept(self) -> dict[str, Tensor]:
        """The mask, and the smoothed sensitivities and uncertainties."""
        return dict(self.named_buffers()) if self.scored else {}

    def folded(self, layer: nn.Module) -> dict[str, Tensor]:
        """The triplets that are left."""
        left = self.left()
        return {"p": self.p[:, left], "e": self.e[left], "q": self.q[left]}

    def left(self) -> Tensor:
        """Which triplets are kept, or have come back, (rank,)."""
        return self.mask.bool() | (self.e != 0)
