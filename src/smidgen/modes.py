"""Looking at a model without leaving a trace: its modes, and the random numbers that go on as if it had not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode that it was in, training or evaluation."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing in the model drops out; afterwards every module is in the mode that it was in."""
    with modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def chance_kept(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards random numbers go on as if none had been drawn inside, on the CPU and on a GPU of CUDA."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def looking(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model answers as in evaluation, and nothing of it is left: no gradient, no mode, no chance taken."""
    with torch.no_grad(), chance_kept(model), evaluating(model):
        yield
