"""The learning-rate sweep behind the defaults: every technique at a third, one and three times its own rate.

    python benchmarks/sweep.py RECIPE RESULTS.json [--jobs 2] [--only lora,houlsby] [--factors 0.33,1,3]

Scores are on the validation split, at the best epoch; the test split is never looked at. Rows that are there already
are kept, so that a stopped sweep goes on. Each technique gets the same number of runs of the same length.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--kind", default="encoder", choices=("encoder", "decoder"))
    parser.add_argument("--factors", default="0.333,1,3")
    parser.add_argument("--options", default="{}", help="JSON: options of the technique, such as '{\"rank\": 16}'")
    chosen = parser.parse_args()
    options = json.loads(chosen.options)
    wanted = [
        {
            "technique": {
                "name": name,
                **options,
                "learning_rate": rounded(METHODS[name].learning_rates[chosen.kind] * float(factor)),
            }
        }
        for name in chosen.only.split(",")
        for factor in chosen.factors.split(",")
    ]
    all_of(wanted, chosen.results, lambda entry: run(chosen.recipe, entry, chosen.jobs), chosen.jobs)


def rounded(rate: float) -> float:
    """A rate with two digits, so that a row can be found again."""
    return float(f"{rate:.2g}")


def run(recipe: Path, entry: Mapping[str, Any], jobs: int) -> Row:
    """The validation scores of one run."""
    metrics = train(recipe, entry, jobs)
    if "error" in metrics:
        return metrics
    best = metrics["curve"][metrics["best_epoch"] - 1]
    return {
        "validation": round(best["validation_score"], 4),
        "validation_loss": round(best["validation_loss"], 4),
        "best_epoch": metrics["best_epoch"],
        "train_loss": round(metrics["curve"][-1]["train_loss"], 4),
        "seconds": round(metrics["seconds"], 1),
    }


if __name__ == "__main__":
    main()
