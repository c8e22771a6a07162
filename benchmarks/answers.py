"""SmolLM2 learns answers with LoRA: does the loss on held-out answers fall, and is the base model untouched?

    python benchmarks/answers.py examples/questions.yaml benchmarks/results/answers.json

The base model's loss on other text (the first 200 embedded tweets) is taken before, after with the adapter active, and
after with the adapter disabled; the last must equal the first to the last bit.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from smidgen import embedded
from smidgen.files import write_json
from smidgen.process.data import Example
from smidgen.process.encoding import Encoded, encode, pad_id
from smidgen.process.evaluate import Scores, evaluate
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(load_recipe(chosen.recipe, [*chosen.set, f"output={folder}/run"]))
        texts = [Example(text) for text, _ in embedded.tweets()[:200]]
        tokens, _ = encode(texts, "classification", job.tokenizer, max_length=96)
        other = [Encoded(row.input_ids, list(row.input_ids)) for row in tokens]
        with job.adapter.disabled():
            answers_before, other_before = score(job, job.splits["test"]), score(job, other)
        metrics = run(job)
        other_active = score(job, other)
        with job.adapter.disabled():
            other_disabled = score(job, other)
    results = {
        "recipe": str(chosen.recipe),
        "technique": metrics["summary"],
        "trained": metrics["trained"],
        "share": metrics["trained"] / metrics["total"],
        "held_out_answers": {
            "rows": len(job.splits["test"]),
            "loss_before": answers_before["loss"],
            "loss_after": metrics["test"]["loss"],
        },
        "other_text": {
            "texts": len(other),
            "perplexity_before": math.exp(other_before["loss"]),
            "perplexity_adapter_active": math.exp(other_active["loss"]),
            "perplexity_adapter_disabled": math.exp(other_disabled["loss"]),
            "disabled_equals_before_to_the_bit": other_disabled["row_losses"] == other_before["row_losses"],
        },
        "seconds": metrics["seconds"],
    }
    write_json(chosen.results, results)
    print(chosen.results.read_text())


def score(job: Job, rows: list[Encoded]) -> Scores:
    """Loss of the rows' labels."""
    return evaluate(job.model, rows, labels=(), pad_id=pad_id(job.tokenizer))


if __name__ == "__main__":
    main()
