"""A model in another mode for a while, such as that of evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


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
