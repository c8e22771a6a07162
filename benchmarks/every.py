"""Every technique at its defaults on one recipe, with several seeds: score on the test split, size, time.

    python benchmarks/every.py RECIPE RESULTS.json [--jobs 2] [--seeds 0,1,2] [--only lora,houlsby] [--epochs 2]

All techniques with the first seed come first, then all with the next. Rows that are there already are kept, so that it
may be stopped at any time. AdapterFusion is left out: it needs adapters of other tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import Row, all_of, train

from smidgen import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(name for name in METHODS if name != "adapter-fusion"))
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    chosen = parser.parse_args()
    common = {} if chosen.epochs is None else {"training.epochs": chosen.epochs}
    wanted = [
        {"technique": name, "seed": int(seed)} for seed in chosen.seeds.split(",") for name in chosen.only.split(",")
    ]
    all_of(wanted, chosen.results, lambda entry: run(chosen.recipe, entry, common, chosen.jobs), chosen.jobs)


def run(recipe: Path, entry: Mapping[str, Any], common: Mapping[str, Any], jobs: int) -> Row:
    """The scores and the costs of one run."""
    metrics = train(recipe, {"technique": entry["technique"], "training.seed": entry["seed"], **common}, jobs)
    if "error" in metrics:
        return metrics
    test = metrics["test"]
    return {
        "score": round(test.get("accuracy", test.get("f1", test["loss"])), 5),
        "loss": round(test["loss"], 4),
        "best_epoch": metrics["best_epoch"],
        "trained": metrics["trained"],
        "share": metrics["trained"] / metrics["total"],
        "core_seconds": metrics["core_seconds"],
        "disk_bytes": metrics["disk_bytes"],
    }


if __name__ == "__main__":
    main()
