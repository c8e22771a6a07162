"""What is found out about a model once, and remembered for as long as the model lives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Found = TypeVar("Found")


def once_a_model(find: Callable[[nn.Module], Found]) -> Callable[[nn.Module], Found]:
    """Let a function that goes through a model do so once: it may then be asked at every step."""
    known: weakref.WeakKeyDictionary[nn.Module, Found] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def remembered(model: nn.Module) -> Found:
        if model not in known:
            known[model] = find(model)
        return known[model]

    return remembered
