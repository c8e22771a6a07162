"""Property tests without a clock: a slow machine is no failure. And runs that need no process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from smidgen.process import trainer
from tests.process.tiny import train_here

settings.register_profile("smidgen", deadline=None, max_examples=50)
settings.load_profile("smidgen")


@pytest.fixture(scope="module")
def runs_here() -> Iterator[None]:
    """The runs of a study or a search in this process, which needs no time to start; compare's tests start some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "execute", train_here)
        yield
