"""How the cost of a LoRA step grows, beside peft's: over rows, tokens of a row, rank, layers and adapters in a batch.

    python benchmarks/growth.py FOLDER/banking77.yaml RESULTS.json PICTURE.svg

MiniLM, rows of one length each, LoRA of rank 8 on all linear layers of 32 rows of 16 tokens where nothing else is said.
Adapters: a forward pass over rows that have so many different ones. Losses and gradients must agree before anything is
timed. Milliseconds are the processor's, one thread, both ways in turn, the median.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from pair import Pair
from peers import mixed
from side_by_side import alternated

from smidgen.files import read_json, write_json
from smidgen.process.encoding import Encoded

TIMES = 6
ROWS, TOKENS, RANK, LAYERS = 32, 16, 8, 6
CURVES: dict[str, tuple[int, ...]] = {
    "rows": (8, 16, 32, 64, 128),
    "tokens of a row": (8, 16, 32, 64, 128),
    "rank": (2, 8, 32, 64),
    "layers": (1, 2, 4, 6),
    "adapters": (1, 2, 4, 8, 16, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    chosen = parser.parse_args()
    found: dict[str, Any] = read_json(chosen.results) if chosen.results.exists() else {}
    for curve, sizes in CURVES.items():
        for size in sizes:
            points = found.setdefault(curve, {})
            if str(size) not in points:
                points[str(size)] = at(chosen.banking77, curve, size)
                write_json(chosen.results, found)
                print(curve, size, points[str(size)], flush=True)
    draw(found, chosen.picture)


def at(recipe: Path, curve: str, size: int) -> dict[str, float]:
    """The milliseconds of both ways at one size."""
    if curve == "adapters":
        seconds = mixed(recipe, size)["seconds"]
    else:
        rows, tokens = size if curve == "rows" else ROWS, size if curve == "tokens of a row" else TOKENS
        rank, layers = size if curve == "rank" else RANK, size if curve == "layers" else LAYERS
        pair = Pair(recipe, ROWS, f"technique={{name: lora, rank: {rank}, layers: 'last:{layers}'}}", "data.rows=200")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (TIMES, rows, tokens), generator=generator).tolist()
        pair.batches = [[Encoded(row, number % 77) for number, row in enumerate(batch)] for batch in ids]
        pair.check()
        seconds = alternated({"smidgen": pair.step, "peft": pair.peft_step}, TIMES)["seconds"]
    return {way: round(1000 * own["median"], 2) for way, own in seconds.items()}


def draw(found: dict[str, dict[str, dict[str, float]]], picture: Path) -> None:
    """A panel for each curve."""
    pyplot.rcParams["svg.hashsalt"] = "growth"
    figure, panels = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3), layout="constrained")
    for panel, (curve, points) in zip(panels, found.items(), strict=True):
        for way in next(iter(points.values())):
            label = {"base": "base model"}.get(way, way)
            panel.plot([int(size) for size in points], [own[way] for own in points.values()], marker="o", label=label)
        panel.set_xlabel(curve)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    panels[0].set_ylabel("milliseconds")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
