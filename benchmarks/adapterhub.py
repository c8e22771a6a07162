"""smidgen and AdapterHub's adapters on the same machine, in turn, with the same weights and batches of real text.

    python benchmarks/adapterhub.py FOLDER/banking77.yaml RESULTS.json --python ENVIRONMENT/bin/python

adapters 1.3.0 needs an older transformers, and so a process in an environment of its own: adapterhub_worker.py, which
says how to make it. Both have LoRA of rank 8 where their LoRA can be: on queries, keys, values and both layers of the
feed-forward network. Losses and gradients must agree before anything is timed. Seconds are the processor's, one thread.

step: a training step without the optimizer's, 32 rows of banking77, grouped by length.
attach, switch: a hundred LoRA adapters attached, and each made the active one in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from pair import AGREES, ROUNDS, as_transformers, body, seconds_of
from safetensors.torch import load_file, save_file
from side_by_side import agreement, summed_up

from smidgen import Adapter, LoRA, attach
from smidgen.files import write_json
from smidgen.process import onednn
from smidgen.process.batches import order
from smidgen.process.encoding import pad_id
from smidgen.process.models import quietly
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.train import backward

TARGETS = r".*(query|key|value|intermediate\.dense|\d\.output\.dense)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has adapters")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = side_by_side(chosen.banking77, chosen.python, Path(folder))
    write_json(chosen.results, found)
    print(json.dumps(found, indent=1))


def side_by_side(recipe: Path, python: Path, folder: Path) -> dict[str, Any]:
    """All three, after the check."""
    job = prepare(load_recipe(recipe, [f"technique={{name: lora, targets: '{TARGETS}'}}"]))
    generator, pad = torch.Generator().manual_seed(0), pad_id(job.tokenizer)
    factors = {name: p for name, p in job.adapter.named_parameters() if ".lora." in name}
    for parameter in factors.values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    places = {f"{name.partition('.lora.')[0]} {name[-1]}": p for name, p in factors.items()}
    save_file({place: p.detach() for place, p in places.items()}, folder / "lora.safetensors")
    rows = job.splits["train"]
    batches = [
        [rows[row] for row in batch] for batch in order([len(row.input_ids) for row in rows], 32, seed=0, epoch=0)
    ][:ROUNDS]
    for number, batch in enumerate(batches):
        save_file(as_transformers(batch, pad), folder / f"batch{number}.safetensors")
    with quietly(), job.adapter.disabled():
        job.model.save_pretrained(folder / "model")

    def step(number: int) -> float:
        job.model.zero_grad(set_to_none=True)
        return backward(job.model, batches[number], job.recipe.training, pad)

    with Worker(python, folder) as theirs:
        job.model.eval()
        losses = step(0), theirs.ask("check")["found"]
        apart = agreement({place: p.grad for place, p in places.items()}, load_file(folder / "theirs.safetensors"))
        if abs(losses[0] - losses[1]) > AGREES * losses[1] or apart > AGREES:
            raise SystemExit(f"no fair comparison: losses {losses}, gradients {apart:.1e} apart")
        job.model.train()
        steps: dict[str, list[float]] = {"smidgen": [], "smidgen without oneDNN": [], "adapters": []}
        for number in range(-1, ROUNDS):
            taken = {
                "smidgen": timed(step, number),
                "smidgen without oneDNN": without_onednn(step, number),
                "adapters": theirs.ask(str(max(number, 0)))["seconds"],
            }
            for way, seconds in taken.items():
                steps[way] += [seconds] * (number >= 0)
        model, attached = body(), list[Adapter]()
        seconds = {
            "attach": {
                "smidgen": seconds_of(lambda: attached.extend(attach(model, LoRA(), name=f"a{n}") for n in range(100))),
                "adapters": round(theirs.ask("attach")["seconds"], 3),
            },
            "switch": {
                "smidgen": seconds_of(lambda: [adapter.activate() for adapter in attached]),
                "adapters": round(theirs.ask("switch")["seconds"], 3),
            },
        }
    ratio = {act: round(own["smidgen"] / own["adapters"], 3) for act, own in seconds.items()}
    return {"step": summed_up(steps), "seconds": seconds, "ratio": ratio, "losses": losses, "gradients_apart": apart}


def timed(step: Callable[[int], object], number: int) -> float:
    """The processor's seconds of a round's step; the round before the first is the first's, to warm up."""
    began = time.process_time()
    step(max(number, 0))
    return time.process_time() - began


def without_onednn(step: Callable[[int], object], number: int) -> float:
    """The same with the products that the other side has."""
    with mock.patch.object(onednn, "pays", return_value=False):
        return timed(step, number)


class Worker:
    """The other side's process, which answers a word with a line of JSON."""

    def __init__(self, python: Path, folder: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("adapterhub_worker.py")), str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""}
        )
        try:
            self._answer()
        except BaseException:
            self.process.kill()
            raise

    def ask(self, word: str) -> dict[str, Any]:
        """What it answers: `found` and the processor's `seconds`."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("adapters' process has ended; what it said is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    main()
