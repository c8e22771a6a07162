"""State that a forward pass keeps between two hooks: each thread has its own, and a copy of a model has none of it."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value for each thread.

    Args:
        default: what a thread has that has set nothing.
    """

    def __init__(self, default: T) -> None:
        self.default = default
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """This thread's value."""
        return self._values.get(_thread(), self.default)

    def set(self, value: T) -> None:
        """Set this thread's value."""
        self._values[_thread()] = value

    def reset(self) -> T:
        """Take this thread's value away, and return it."""
        return self._values.pop(_thread(), self.default)

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "_values": {}}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
