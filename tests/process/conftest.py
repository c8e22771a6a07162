"""Runs that need no process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smidgen.process import trainer
from tests.process.tiny import train_here


@pytest.fixture(scope="module")
def runs_here() -> Iterator[None]:
    """The runs of a study or a search in this process, which needs no time to start; compare's tests start some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "execute", train_here)
        yield
