"""A model that `smidgen pretrain` made, fine-tuned beside the same network with random weights.

    python benchmarks/pretrained.py RECIPE MODEL RESULTS.json [--jobs 2] [--seeds 0,1,2]

MODEL is the folder that the pre-training wrote, in place of the recipe's model. Rows that are there already are kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from training import Row, all_of, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {"pretrained": str(chosen.model.absolute()), "random": random_twin(chosen.model, Path(folder))}
        wanted = [{"weights": name, "seed": int(seed)} for seed in chosen.seeds.split(",") for name in models]
        all_of(wanted, chosen.results, lambda entry: run(chosen.recipe, entry, models, chosen.jobs), chosen.jobs)


def random_twin(model: Path, folder: Path) -> str:
    """The same network and tokenizer with the weights that training would begin from."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    getattr(transformers, config.architectures[0])(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def run(recipe: Path, entry: Mapping[str, Any], models: Mapping[str, str], jobs: int) -> Row:
    """The scores of one run."""
    metrics = train(recipe, {"model": models[entry["weights"]], "training.seed": entry["seed"]}, jobs)
    if "error" in metrics:
        return metrics
    scores = ("accuracy", "f1", "loss", "exact_match")
    return {name: round(metrics["test"][name], 4) for name in scores if name in metrics["test"]}


if __name__ == "__main__":
    main()
