"""AdamW over what an adapter trains; its rates are a function of the step, so that nothing of them is saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from smidgen.process.run_recipe import TrainingConfig
from smidgen.rates import parameter_groups

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


Rates = tuple[tuple[float, ...], float]
"""The learning rates of the techniques of an adapter, and that of the task's head."""


def make_optimizer(adapter: Adapter, config: TrainingConfig, rates: Rates) -> torch.optim.Optimizer:
    """AdamW over the techniques and the head, with their own rates; a group's full rate is its `rate`."""
    techniques, head_rate = rates
    groups = parameter_groups(adapter, techniques, head_learning_rate=head_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW([{**group, "rate": group["lr"]} for group in groups], fused=True)


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
