"""How many labels that were changed at random are doubted, and how many doubted labels were changed.

python benchmarks/mislabelled.py TRAIN.csv benchmarks/results/mislabelled.json [--text text] [--label category]
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from smidgen.files import write_json
from smidgen.process.mislabelled import doubtful


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="category")
    parser.add_argument("--share", type=float, default=0.05)
    chosen = parser.parse_args()
    with chosen.rows.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(0)
    labels = [row[chosen.label] for row in rows]
    names = sorted(set(labels))
    changed = set(draw.sample(range(len(rows)), round(chosen.share * len(rows))))
    given = [draw.choice([n for n in names if n != label]) if i in changed else label for i, label in enumerate(labels)]
    found = [doubt.row for doubt in doubtful([row[chosen.text] for row in rows], given)]
    write_json(
        chosen.results,
        {
            "rows": len(rows),
            "changed": len(changed),
            "doubted": len(found),
            "changed_of_doubted": len(changed.intersection(found)) / len(found),
            "changed_of_first_100": len(changed.intersection(found[:100])) / 100,
            "doubted_of_changed": len(changed.intersection(found)) / len(changed),
        },
    )
    print(chosen.results.read_text())


if __name__ == "__main__":
    main()
