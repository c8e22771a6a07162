"""AdamW over what an adapter trains; its rates are a function of the step, so that nothing of them is saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from smidgen.process.run_recipe import RunRecipe, TrainingConfig
from smidgen.rates import parameter_groups

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


Rates = tuple[tuple[float, ...], float]
"""The learning rates of the techniques of an adapter, and that of the task's head."""


def rates_of(
    recipe: RunRecipe, adapter: Adapter, kind: Literal["encoder", "decoder"], *, default: float | None = None
) -> Rates:
    """The learning rates of an adapter's techniques and of the head: the entry's, the recipe's or the techniques' own.

    Args:
        recipe: the run's.
        adapter: with the techniques.
        kind: of the model, which decides about the techniques' own.
        default: instead of the techniques' own.
    """
    spec, training, methods = recipe.technique, recipe.training, adapter.methods
    rates = tuple(
        part.learning_rate or training.learning_rate or default or method.learning_rates[kind]
        for part, method in zip(spec.parts, methods, strict=True)
    )
    own = methods[0].head_learning_rate if default is None else None
    return rates, spec.head_learning_rate or training.head_learning_rate or own or rates[0]


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
