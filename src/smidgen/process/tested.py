"""The test scores of a run that was trained without them, measured once, when all is decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smidgen import files, manifest
from smidgen.process.job import reopen


def test_scores(folder: Path) -> dict[str, Any]:
    """The scores of a finished run on its test split, kept in test.json as long as its adapter and its rows stay.

    Args:
        folder: the run's output.
    """
    path = folder / "test.json"
    known = {
        "adapter": files.sha256(folder / "adapter" / manifest.FILE),
        "data": files.read_json(folder / "metrics.json")["data"],
    }
    return dict(files.once(path, known, lambda: {"test": reopen(folder).evaluate()})["test"])
