"""Whether the ranks that identify chooses beat equal ones of the same budget: several seeds of each, on one recipe.

    python benchmarks/ranks.py RECIPE RESULTS.json --rank 4 [--spreads 2,64] [--set training.epochs=2]

A spread is how many times the equal rank a layer may have at most; smidgen's own is 2. The runs are kept in the
recipe's output, so that it may be stopped at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smidgen.files import write_json
from smidgen.process.compare import compare
from smidgen.process.identification import allot, identify, low_rank, technique_of
from smidgen.process.recipe import load_recipe
from smidgen.process.technique import TechniqueSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rank", type=int, default=2, help="that all layers have where it is equal")
    parser.add_argument("--spreads", default="2,64")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a change of the recipe")
    chosen = parser.parse_args()
    recipe = load_recipe(chosen.recipe, chosen.set)
    found, like = identify(recipe), low_rank(recipe)
    budget = chosen.rank * sum(layer.size for layer in found)
    arms = {"equal": {layer.place: chosen.rank for layer in found}}
    for spread in chosen.spreads.split(","):
        arms[f"up to {spread} times"] = allot(found, budget, spread=float(spread))
    specs = {name: TechniqueSpec.parse(technique_of(found, ranks, like=like)) for name, ranks in arms.items()}
    variants = recipe.model_copy(update={"compare": tuple(specs.values())})
    rows = {row["name"]: row for row in compare(variants, command="", at_once=chosen.at_once)["techniques"]}
    results = [
        {
            "ranks": name,
            "largest": max(arms[name].values()),
            "trained": rows[spec.slug]["trained"],
            "validation": rows[spec.slug]["validation"],
            "scores": rows[spec.slug]["scores"],
        }
        for name, spec in specs.items()
    ]
    write_json(chosen.results, results)
    for row in results:
        print(row)


if __name__ == "__main__":
    main()
