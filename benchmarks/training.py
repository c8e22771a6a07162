"""What benchmarks run and keep: many trainings of one recipe, or named cases, each once it is there: no command."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smidgen.files import read_json, write_json

Row = dict[str, Any]


Recipes = Mapping[str, Path]
"""Recipes for MiniLM and for SmolLM2, by `minilm` and `smollm2`."""


def keep_cases(about: str | None, cases: Mapping[str, Callable[[Recipes], Row]], **beside: Any) -> None:
    """The command of a benchmark of cases: BANKING77 QUESTIONS RESULTS, and `--only` some of them.

    Args:
        about: what `--help` says.
        cases: by name, what each measures.
        beside: kept with each.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default=",".join(cases))
    chosen = parser.parse_args()
    for case in chosen.only.split(","):
        found = cases[case]({"minilm": chosen.banking77, "smollm2": chosen.questions})
        results = read_json(chosen.results) if chosen.results.exists() else {}
        write_json(chosen.results, {**results, case: {**found, **beside}})
        print(case, found, flush=True)


def all_of(
    wanted: Sequence[Mapping[str, Any]], results: Path, run: Callable[[Mapping[str, Any]], Row], jobs: int
) -> None:
    """Run what the file of results lacks; a row of it has the keys that were wanted, and those that `run` gives.

    Args:
        wanted: what each run is told by.
        results: a list of rows; those with an `error` are tried again.
        run: gives the rest of a row.
        jobs: runs at once.
    """
    rows: list[Row] = json.loads(results.read_text()) if results.exists() else []
    rows = [row for row in rows if "error" not in row]
    missing = [entry for entry in wanted if not any(entry.items() <= row.items() for row in rows)]
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(lambda entry: {**entry, **run(entry)}, missing):
            rows.append(row)
            write_json(results, rows)
            print(json.dumps(row), flush=True)


def train(recipe: Path, changes: Mapping[str, Any], jobs: int) -> Row:
    """What a run's metrics.json holds and its `core_seconds`, or its `error`; its files are not kept.

    The time that its cores were at work, its start included, hardly changes when the machine has other things to do.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "smidgen", "train", str(recipe), "--json"]
        for name, value in {**changes, "output": f"{folder}/run"}.items():
            command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        with Path(folder, "out").open("w+") as out, Path(folder, "err").open("w+") as err:
            started = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "OMP_NUM_THREADS": threads})
            _, status, used = os.wait4(started.pid, 0)
            started.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            if started.returncode:
                return {"error": (err.read().strip().splitlines() or [f"ended with {started.returncode}"])[-1]}
            found: Row = json.loads(out.read())
    return {**found, "core_seconds": round(used.ru_utime + used.ru_stime, 1)}
