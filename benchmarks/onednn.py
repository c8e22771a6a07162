"""A training step with fp32 products by oneDNN, beside PyTorch's own: the time, and that loss and gradients agree.

    OMP_NUM_THREADS=1 python benchmarks/onednn.py benchmarks/results/onednn.json

LoRA on all linear layers of MiniLM and SmolLM2, 16 rows of 16 or 64 tokens, eight steps each way in turn; medians. The
roof is the best of the products of MiniLM's widest layer, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from smidgen import LoRA, attach, embedded
from smidgen.files import write_json
from smidgen.process.models import quietly
from smidgen.process.onednn import exact_onednn, is_exact

WAYS = {"pytorch": torch.device("meta"), "onednn": torch.device("cpu")}
ROWS, STEPS = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    inputs, weights = torch.randn(512, 384), torch.randn(1536, 384)
    roof = {way: 2 * 512 * 384 * 1536 / min(timed(lambda: inputs @ weights.T, 50)) / 1e9 for way in in_turn(1)}
    found: dict[str, Any] = {"exact": is_exact(), "threads": torch.get_num_threads(), "roof_gflops": roof}
    for name, kind in (("minilm", AutoModelForSequenceClassification), ("smollm2", AutoModelForCausalLM)):
        with quietly():
            model = kind.from_pretrained(embedded.model_folder(name)).eval()
        adapter = attach(model, LoRA())
        for length in (16, 64):
            found[f"{name}, {length} tokens"] = compared(step_of(model, adapter.parameters, length))
    write_json(chosen.results, found)
    print(chosen.results.read_text())


def step_of(model: Any, parameters: Callable[[], Any], length: int) -> Callable[[], list[Tensor]]:
    """A forward and a backward pass; what it returns is the loss and the gradients."""
    tokens = torch.randint(1000, 20000, (ROWS, length))
    labels = tokens if model.config.architectures == ["LlamaForCausalLM"] else torch.zeros(ROWS, dtype=torch.int64)

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in parameters())]

    return step


def compared(step: Callable[[], list[Tensor]]) -> dict[str, Any]:
    """Both ways in turn: their seconds, the ratio, and how far apart their losses and gradients are."""
    results = {way: step() for way in in_turn(1)}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in in_turn(STEPS):
        seconds[way] += timed(step, 1)
    medians = {way: statistics.median(own) for way, own in seconds.items()}
    (loss, *gradient), (other_loss, *other) = results["pytorch"], results["onednn"]
    apart = torch.cat([(a - b).flatten() for a, b in zip(gradient, other, strict=True)]).norm()
    return {
        "seconds": medians,
        "ratio": medians["pytorch"] / medians["onednn"],
        "loss_difference": abs(float(loss - other_loss)),
        "gradient_error": float(apart / torch.cat([a.flatten() for a in gradient]).norm()),
    }


def in_turn(times: int) -> Any:
    """The names of both ways, one after the other, each while its own is in force."""
    for _ in range(times):
        for way, device in WAYS.items():
            with exact_onednn(device):
                yield way


def timed(function: Callable[[], object], times: int) -> list[float]:
    """The seconds of each call."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
