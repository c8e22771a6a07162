"""What the options of docs/speed.md do here: number formats, compiled blocks, and frozen blocks that do not drop out.

    python benchmarks/options.py FOLDER/banking77.yaml examples/questions.yaml RESULTS.json [--only precision]

precision: seconds a step, the peak of the process, and what 8-bit weights round, of some steps of SmolLM2 with LoRA.
compile: seconds a step of MiniLM with LoRA, compiled or not, and the time before the first step that compiling takes.
dropout: test accuracy of LoRA in MiniLM's last two blocks with three seeds, frozen blocks dropping out or not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import Recipes, keep_cases, train

FEW, MORE = 8, 24
"""Steps of the runs whose difference is the time of a step."""


def precision(recipes: Recipes) -> dict[str, Any]:
    """Of each number format: seconds a step, peak memory, and what a user is told about rounding."""
    found = {}
    for kind in ("fp32", "bf16", "int8"):
        runs = [_run(recipes["smollm2"], {"training.precision": kind}, steps) for steps in (FEW, MORE)]
        found[kind] = {
            **_step(*runs),
            "peak_memory_bytes": runs[-1]["peak_memory_bytes"],
            "notes": [note for note in runs[-1]["notes"] if "8-bit" in note],
        }
    return found


def compiled(recipes: Recipes) -> dict[str, Any]:
    """Of blocks as they are and compiled: seconds a step, and before the first one."""
    found = {}
    for name, on in (("as they are", False), ("compiled", True)):
        changes = {"training.compile": on, "training.frozen_states": "off"}
        found[name] = _step(*(_run(recipes["minilm"], changes, steps) for steps in (FEW, MORE)))
    return found


def dropout(recipes: Recipes) -> dict[str, list[float]]:
    """Test accuracy of each seed, frozen blocks dropping out and not."""
    common = {"technique": {"name": "lora", "layers": "last:2"}, "training.epochs": 2}
    found = {}
    for name, on in (("dropping out", True), ("not", False)):
        changes = {**common, "training.frozen_dropout": on}
        runs = [_measured(recipes["minilm"], {**changes, "training.seed": seed}) for seed in range(3)]
        found[name] = [run["test"]["accuracy"] for run in runs]
    return found


def _run(recipe: Path, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    common = {"technique": "lora", "data.rows": 400, "training.max_steps": steps, "score_test": False}
    return _measured(recipe, {**common, **changes})


def _measured(recipe: Path, changes: dict[str, Any]) -> dict[str, Any]:
    metrics = train(recipe, changes, jobs=1)
    if "error" in metrics:
        raise SystemExit(metrics["error"])
    return metrics


def _step(few: dict[str, Any], more: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, from two runs of the same rows, and those that the shorter one took beside its steps."""
    a_step = (more["seconds"] - few["seconds"]) / (MORE - FEW)
    return {"step_seconds": round(a_step, 4), "before_seconds": round(few["seconds"] - FEW * a_step, 2)}


CASES: dict[str, Callable[[Recipes], dict[str, Any]]] = {
    "precision": precision,
    "compile": compiled,
    "dropout": dropout,
}


if __name__ == "__main__":
    keep_cases(__doc__, CASES)
