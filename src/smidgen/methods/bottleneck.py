"""What the bottleneck adapters share: down to a few numbers, a nonlinearity, up again, added to the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smidgen.delta import Delta, cast, check_positive, check_share, dropped

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def check_bottleneck(title: str, *, size: float, scale: float, nonlinearity: str, dropout: float) -> None:
    """Raise a ValueError that names the field unless all are sensible; `size` is a width or a reduction factor."""
    check_positive(title, "size", size)
    check_positive(title, "scale", float(scale))
    check_share(title, "dropout", dropout)
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"{title}'s nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}.")


def check_sublayers(title: str, targets: str) -> None:
    """Raise a ValueError unless the targets are sublayers."""
    if "sublayer" not in targets:
        raise ValueError(
            f"{title}'s targets must be whole sublayers, which have a start and an end: feed-forward-sublayer, "
            f"attention-sublayer or sublayers, got {targets!r}."
        )


def reduced(width: int, reduction: int) -> int:
    """The width of a bottleneck that is so many times narrower; 1 at least."""
    return max(1, width // reduction)


class BottleneckDelta(Delta):
    """h + scale · up(nonlinearity(down(x))), with x = h (sequential) or the sublayer's input (parallel).

    Args:
        width: the hidden size of h and x.
        size: the bottleneck's.
        scale: multiplies what is added.
        nonlinearity: one of `NONLINEARITIES`.
        dropout: probability of dropping a number of the bottleneck while training.
        parallel: whether x is what goes into the sublayer, instead of h.
        deviation: standard deviation of the starting weights; `up` starts at zero when it is 0.
    """

    def __init__(
        self,
        width: int,
        *,
        size: int,
        scale: float,
        nonlinearity: str,
        dropout: float,
        parallel: bool = False,
        deviation: float = 0.0,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if deviation:
            for linear in (self.down, self.up):  # Houlsby, section 3.6: near the identity, cut at two deviations
                nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        self.scale = scale
        self.nonlinearity = nonlinearity
        self.dropout = dropout
        self.reads_source = parallel

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Hidden, the layer's output, and the result: (..., width); inputs, used only if parallel: one (..., width)."""
        return torch.add(hidden, self.added(inputs[0] if self.reads_source else hidden), alpha=self.scale)

    def added(self, x: Tensor) -> Tensor:
        """up(nonlinearity(down(x))), (..., width)."""
        low = functional.linear(x, cast(self.down.weight, x), cast(self.down.bias, x))
        low = dropped(NONLINEARITIES[self.nonlinearity](low), self.dropout, self.training)
        return functional.linear(low, cast(self.up.weight, x), cast(self.up.bias, x))
