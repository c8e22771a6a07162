"""The scores of a finished run that it was trained without, measured once, when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from smidgen import files, manifest
from smidgen.process.opening import reopen


def scores_on(folder: Path, split: Literal["validation", "test"]) -> dict[str, Any]:
    """The scores of a finished run on a split: the run's own, or those of a file beside them.

    The file, test.json or validation.json, is good as long as the run's adapter and its rows stay.

    Args:
        folder: the run's output.
        split: whose rows are scored.
    """
    metrics = files.read_json(folder / "metrics.json")
    if metrics[split] is not None:
        return dict(metrics[split])

    def measured() -> dict[str, Any]:
        job = reopen(folder)
        return {split: job.evaluate() if split == "test" else job.score(job.splits[split])}

    known = {"adapter": manifest.hash_of(folder / "adapter"), "data": metrics["data"]}
    return dict(files.once(folder / f"{split}.json", known, measured)[split])
