"""What the hundredth adapter costs beside the first: attaching, loading, switching, and a forward pass.

    python benchmarks/hundred.py benchmarks/results/hundred.json [--adapters 100]

LoRA on all linear layers of MiniLM. Times are medians; those of the last ten adapters beside those of the first ten.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from smidgen import LoRA, attach, embedded, load
from smidgen.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--adapters", type=int, default=100)
    chosen = parser.parse_args()
    folder = embedded.model_folder("minilm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    batch = {"input_ids": torch.randint(1000, 2000, (8, 32))}

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    forward()
    base = timed(forward, 20)
    attaching, adapters = [], []
    for number in range(chosen.adapters):
        began = time.perf_counter()
        adapters.append(attach(model, LoRA(), name=f"a{number}"))
        attaching.append(time.perf_counter() - began)
        if number == 0:
            alone = timed(forward, 20)
    together = timed(forward, 20)
    switching = [timed(adapter.activate, 1) for adapter in adapters]
    with tempfile.TemporaryDirectory() as saved:
        adapters[0].save(Path(saved) / "one")
        for adapter in adapters:
            adapter.detach()
        loading = []
        for number in range(chosen.adapters):
            began = time.perf_counter()
            load(model, Path(saved) / "one", name=f"b{number}")
            loading.append(time.perf_counter() - began)
    results = {
        "adapters": chosen.adapters,
        "attach_seconds": ends(attaching),
        "load_seconds": ends(loading),
        "switch_seconds": ends(switching),
        "forward_seconds": {"base": base, "one adapter on the model": alone, "all on the model": together},
    }
    write_json(chosen.results, results)
    print(chosen.results.read_text())


def timed(act: Callable[[], object], times: int) -> float:
    """The median seconds of an act."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds), 5)


def ends(seconds: list[float]) -> dict[str, float]:
    """The medians of the first ten and of the last ten."""
    first, last = statistics.median(seconds[:10]), statistics.median(seconds[-10:])
    return {"first": round(first, 5), "last": round(last, 5), "ratio": round(last / first, 2)}


if __name__ == "__main__":
    main()
