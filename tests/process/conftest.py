"""Property tests without a clock: a slow machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("smidgen", deadline=None, max_examples=50)
settings.load_profile("smidgen")
