"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Mahabadi et al., 2021, arXiv:2106.04647.

A bottleneck after every sublayer, as Houlsby's, whose two matrices are sums of n Kronecker products Σ Ai ⊗ (si tiᵀ)
(section 3.2, equation 5): the n small matrices Ai, n × n, are shared by all matrices of all layers, and each matrix has
its own thin si and ti of rank one. n divides both sides of a matrix. The layer norms are trained as well. Where we
differ: the si of the way up start at zero, so that training starts from the base model; and the bottleneck's width is
the hidden size over 32 or, where n does not divide it, the next multiple of n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, Method, cast, check_positive, dropped
from smidgen.methods.bottleneck import NONLINEARITIES, check_bottleneck, check_sublayers, reduced
from smidgen.targets import Place, norm_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    """Learns a bottleneck after every sublayer, its matrices Kronecker products with a part that all layers share.

    Args:
        reduction: the hidden size over the bottleneck's width.
        n: how many products a matrix is the sum of; it must divide the hidden size.
        nonlinearity: relu, gelu, silu or tanh.
        dropout: probability of dropping a number of the bottleneck while training.
        norms: whether the norms inside the chosen blocks are trained too, as in the paper.
        targets: which sublayers: "sublayers", "attention-sublayer" or "feed-forward-sublayer".
        layers: which blocks: "all", "last:4", "0-3", "0,5".

    Raises:
        ValueError: a value is outside its range, or `n` does not divide the hidden size.
    """

    name = "compacter"
    title = "Compacter"
    paper = "arXiv:2106.04647"
    learning_rates: ClassVar = {"encoder": 3e-3, "decoder": 1e-3}

    reduction: int = 32
    n: int = 4
    nonlinearity: str = "gelu"
    dropout: float = 0.0
    norms: bool = True
    targets: str = "sublayers"
    layers: str = "all"

    def check(self) -> None:
        """Raise a ValueError that names the field."""
        check_positive(self.title, "reduction", self.reduction)
        check_positive(self.title, "n", self.n)
        check_bottleneck(self.title, size=1, scale=1.0, nonlinearity=self.nonlinearity, dropout=self.dropout)
        check_sublayers(self.title, self.targets)

    def build_all(self, model: PreTrainedModel, places: Sequence[Place]) -> list[Delta]:
        """The deltas at the end of all sublayers, around the small matrices that they share."""
        if uneven := [place for place in places if place.shape[1] % self.n]:
            raise ValueError(
                f"{self.title}'s n={self.n} does not divide the hidden size {uneven[0].shape[1]} of {uneven[0].name}. "
                "Choose a divisor of it."
            )
        rules = Rules(self.n)
        return [CompacterDelta(rules, place.shape[1], self) for place in places]

    def own_parameters(self, model: PreTrainedModel) -> list[str]:
        """The norms inside the chosen blocks."""
        return norm_parameters(model, self.layers, inside_only=True) if self.norms else []


class Rules(nn.Module):
    """What all matrices share: `a`, the matrices Ai, (n, n, n)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(n, n, n) * 0.1)


class Hypercomplex(nn.Module):
    """One matrix Σ Ai ⊗ (si tiᵀ), (out, in); `s` is (n, out / n), `t` (n, in / n) and `bias` (out,)."""

    def __init__(self, n: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(n, out_features // n))
        self.t = nn.Parameter(torch.empty(n, in_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (self.s, self.t):
            nn.init.xavier_uniform_(factor)

    def forward(self, rules: Tensor, x: Tensor) -> Tensor:
        """x: (..., in); result: (..., out); rules: Ai, (n, n, n)."""
        rows = torch.einsum("iab,ic,id->acbd", rules, self.s, self.t)  # of Ai ⊗ (si tiᵀ), summed over i
        return functional.linear(x, cast(rows.flatten(2).flatten(0, 1), x), cast(self.bias, x))


class CompacterDelta(Delta):
    """h + up(nonlinearity(down(h))), at the end of one sublayer."""

    def __init__(self, rules: Rules, width: int, method: Compacter) -> None:
        super().__init__()
        size = -(-reduced(width, method.reduction) // method.n) * method.n
        self.rules = rules
        self.down = Hypercomplex(method.n, width, size)
        self.up = Hypercomplex(method.n, size, width)
        nn.init.zeros_(self.up.s)
        self.nonlinearity, self.dropout = method.nonlinearity, method.dropout

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the sublayer's output, and the result: (..., width)."""
        low = NONLINEARITIES[self.nonlinearity](self.down(self.rules.a, hidden))
        added: Tensor = self.up(self.rules.a, dropped(low, self.dropout, self.training))
        return hidden + added
