"""AdapterHub's side of adapterhub.py, in an environment of its own: pip install torch==2.13.0 adapters==1.3.0.

It reads a folder with a model, LoRA's factors and batches, and then a word a line: what to do, answered by a line of
JSON. Nothing of smidgen is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    adapters.init(model)
    given = load_file(folder / "lora.safetensors")
    config = adapters.LoRAConfig(
        r=8, alpha=16, selfattn_lora=True, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
    )
    model.add_adapter("lora", config=config)
    model.train_adapter("lora")
    factors = {name: p for name, p in model.named_parameters() if ".loras.lora." in name}
    places = {_place(name): p for name, p in factors.items()}
    if places.keys() != given.keys():
        raise SystemExit(f"not the same places: {sorted(places)[:3]} and {sorted(given)[:3]}")
    for place, parameter in places.items():
        parameter.data.copy_(given[place])
    batches = [
        load_file(folder / f"batch{number}.safetensors")
        for number in range(len(list(folder.glob("batch*.safetensors"))))
    ]

    def step(number: int) -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**batches[number]).loss
        loss.backward()
        return float(loss.detach())

    def check() -> float:
        model.eval()
        loss = step(0)
        save_file({place: p.grad for place, p in places.items()}, folder / "theirs.safetensors")
        model.train()
        return loss

    def attach() -> None:
        for number in range(100):
            model.add_adapter(f"a{number}", config=config)

    def switch() -> None:
        for number in range(100):
            model.set_active_adapters(f"a{number}")

    acts: dict[str, Callable[[], object]] = {"check": check, "attach": attach, "switch": switch}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        word = line.strip()
        act = acts.get(word) or (lambda word=word: step(int(word)))
        began = time.process_time()
        found = act()
        print(json.dumps({"found": found, "seconds": time.process_time() - began}), flush=True)


def _place(name: str) -> str:
    """A factor's layer and letter: "LAYER a"."""
    layer, _, rest = name.partition(".loras.lora.lora_")
    return f"{layer} {rest.lower()}"


if __name__ == "__main__":
    main()
