"""The learning-rate sweep behind the defaults: every technique at a third, one and three times its own rate.

    python benchmarks/sweep.py RECIPE RESULTS.json [--jobs 2] [--only lora,houlsby] [--factors 0.33,1,3]

Scores are on the validation split, at the best epoch; the test split is never looked at. Rows that are there already
are kept, so that a stopped sweep goes on. Each technique gets the same number of runs of the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smidgen import METHODS
from smidgen.files import write_json

Row = dict[str, float | str]


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
    rows: list[Row] = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    rows = [row for row in rows if "error" not in row]
    wanted = [
        {"name": name, **options, "learning_rate": rounded(METHODS[name].learning_rates[chosen.kind] * float(factor))}
        for name in chosen.only.split(",")
        for factor in chosen.factors.split(",")
    ]
    missing = [entry for entry in wanted if not any(row["technique"] == entry for row in rows)]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for row in pool.map(lambda entry: run(chosen.recipe, entry, chosen.jobs), missing):
            rows.append(row)
            write_json(chosen.results, rows)
            print(json.dumps(row), flush=True)


def rounded(rate: float) -> float:
    """A rate with two digits, so that a row can be found again."""
    return float(f"{rate:.2g}")


def run(recipe: Path, technique: dict[str, object], jobs: int) -> Row:
    """Train once; the technique and its validation scores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "smidgen", "train", str(recipe), "--json"]
        command += ["--set", f"technique={json.dumps(technique)}", "--set", f"output={folder}/run"]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    if ended.returncode:
        return {"technique": technique, "error": ended.stderr.strip().splitlines()[-1]}
    metrics = json.loads(ended.stdout)
    best = metrics["curve"][metrics["best_epoch"] - 1]
    return {
        "technique": technique,
        "validation": round(best["validation_score"], 4),
        "validation_loss": round(best["validation_loss"], 4),
        "best_epoch": metrics["best_epoch"],
        "train_loss": round(metrics["curve"][-1]["train_loss"], 4),
        "seconds": round(metrics["seconds"], 1),
    }


if __name__ == "__main__":
    main()
