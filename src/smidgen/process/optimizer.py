"""AdamW over what an adapter trains; its rates are a function of the step, so that nothing of them is saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen.process.recipe import TrainingConfig

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


def make_optimizer(adapter: Adapter, config: TrainingConfig, rates: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW over the head and the rest, with their own rates; biases, norms and other vectors do not decay."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in adapter.named_parameters():
        groups.setdefault((name in adapter.head_names, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rates[head], "weight_decay": config.weight_decay * decays}
            for (head, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=rates[0],
        fused=True,
    )


def rate_at(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0, as a share of the full rate."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.schedule]


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, config: TrainingConfig) -> float:
    """Set the rates of a step, counted from 0; returns the adapter's, or the head's if nothing else is trained."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * rate_at(step, steps, config)
    return float(optimizer.param_groups[0]["lr"])
