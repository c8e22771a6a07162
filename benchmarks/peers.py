"""smidgen and peft on the same machine, in the same run, with the same weights and batches of real text.

    python benchmarks/peers.py FOLDER/banking77.yaml examples/questions.yaml RESULTS.json [--only mixed]

The recipes are those of examples/, banking77's with its data beside it. Before a step is timed, losses and gradients
must agree, and before a pass over mixed rows the states; whole runs give their losses. Both ways go in turn. Seconds
are the processor's, and on a GPU, which is used if there is one, the clock's.

step-minilm: a training step of LoRA on all linear layers, 32 rows of banking77, grouped by length.
step-smollm2: the same of SmolLM2, 8 questions with their answers, every token learned.
answers: the same, the answers alone learned; peft's model computes the vocabulary at every token.
activations: what such a step keeps for its backward pass, of a base in bf16; peft by itself, and under autocast.
mixed-8, mixed-32: a forward pass over 32 rows, each with one of so many LoRA adapters, over the base model's own.
recipe: an epoch over 2,000 rows of banking77 as a user runs it: our recipe's defaults, and peft with Trainer's.
answers-recipe: the same of 200 questions with their answers and SmolLM2.
top-third: five epochs over them with LoRA in the last two of six blocks: states kept, and peft with the same batches.
eight: eight seeds of it, three epochs of 1,000 rows, the model loaded for each; states kept by the first, or by none.
one-pass: what eight of them that have the same batches would gain by computing them together, above kept states.
hundred: a hundred LoRA adapters attached to MiniLM, and each made the active one in turn.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from pair import AGREES, ROUNDS, Pair, body, perturb, seconds_of
from peers_runs import eight, one_pass, recipe, top_third
from side_by_side import DEVICE, agreement, alternated, device_name, roof
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training import Recipes, keep_cases

from smidgen import Adapter, LoRA, attach, rows, save_peft
from smidgen.placeholders import IGNORED
from smidgen.process.batches import collate
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.models import quietly
from smidgen.process.onednn import exact_onednn
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.trial import counted


def whole(row: Encoded) -> Encoded:
    """The row with every token learned."""
    return dataclasses.replace(row, labels=[*row.input_ids[1:], IGNORED])


def step(recipe: Path, rows_at_once: int, *, every_token: bool = False) -> dict[str, Any]:
    """A training step without the optimizer's, which is the same for both."""
    pair = Pair(recipe, rows_at_once)
    if every_token:
        pair.batches = [[whole(row) for row in batch] for batch in pair.batches]
    agreed = pair.check()

    def by_onednn(number: int) -> None:
        with exact_onednn(DEVICE):
            pair.peft_step(number)

    ways: dict[str, Callable[[int], object]] = {
        "smidgen": pair.step,
        "peft by oneDNN": by_onednn,
        "peft": pair.peft_step,
    }
    if DEVICE.type != "cpu":
        del ways["peft by oneDNN"]
    found = alternated(ways, ROUNDS)
    return found | agreed | roof_of(pair, found["seconds"]["smidgen"]["median"])


def roof_of(pair: Pair, seconds: float) -> dict[str, Any]:
    """What the machine's products reach, how many operations of our step are products, and what part of it they are."""
    with exact_onednn(DEVICE):
        gflops = roof()
    with FlopCounterMode(display=False) as counter:
        for number in range(len(pair.batches)):
            pair.step(number)
    products = counter.get_total_flops() / len(pair.batches) / 1e9
    padded = sum(len(batch) * max(len(row.input_ids) for row in batch) for batch in pair.batches) / len(pair.batches)
    return {
        "roof_gflops": round(gflops, 1),
        "products_gflop": round(products, 2),
        "share_of_roof": round(products / seconds / gflops, 3),
        "padded_tokens": padded,
    }


def activations(recipe: Path, rows_at_once: int) -> dict[str, Any]:
    """The bytes that autograd keeps in a step, each storage once, weights left out."""
    pair = Pair(recipe, rows_at_once, "training.precision=bf16")
    kept = {}
    acts: dict[str, Callable[[], float]] = {
        "smidgen": lambda: pair.step(0),
        "peft under autocast": lambda: pair.peft_step(0, autocast=True),
        "peft": lambda: pair.peft_step(0),
    }
    for name, act in acts.items():
        with counted(pair.theirs if name.startswith("peft") else pair.ours) as storages:
            act()
        kept[name] = storages.total()
    return {"bytes": kept, "ratio": {name: round(own / kept["peft"], 3) for name, own in kept.items()}}


def mixed(recipe: Path, adapters: int) -> dict[str, Any]:
    """A forward pass of the model's body over rows of several adapters; peft has the same ones."""
    job = prepare(load_recipe(recipe, ["technique=head"]))
    ours, base, theirs = (body() for _ in range(3))
    typical = sorted(job.splits["train"], key=lambda row: len(row.input_ids))[len(job.splits["train"]) // 2 :][:32]
    inputs = {name: tensor.to(DEVICE) for name, tensor in collate(typical, pad_id(job.tokenizer)).items()}
    del inputs["labels"]
    names = [f"a{row % adapters}" for row in range(len(typical))]
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, quietly():
        for name in dict.fromkeys(names):
            adapter = attach(ours, LoRA(), name=name)
            perturb(adapter, generator)
            save_peft(adapter, Path(folder) / name)
            if name == "a0":
                peft_s = peft.PeftModel.from_pretrained(theirs, f"{folder}/{name}", adapter_name=name)
            else:
                peft_s.load_adapter(f"{folder}/{name}", adapter_name=name)

    def alone(_: int) -> Tensor:
        with exact_onednn(DEVICE):
            return base(**inputs)[0]  # type: ignore[no-any-return]

    def by_rows(_: int) -> Tensor:
        with rows(ours, names), exact_onednn(DEVICE):
            return ours(**inputs)[0]  # type: ignore[no-any-return]

    def by_names(_: int) -> Tensor:
        with exact_onednn(DEVICE):
            return peft_s(**inputs, adapter_names=names)[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        apart = agreement({"states": by_rows(0)}, {"states": by_names(0)})
        changed = agreement({"states": by_rows(0)}, {"states": alone(0)})
        if apart > AGREES or changed < 100 * AGREES:
            raise SystemExit(f"no fair comparison: states {apart:.1e} apart, {changed:.1e} from the base model's")
        found = alternated({"smidgen": by_rows, "peft": by_names, "base": alone}, 3 * ROUNDS)
    return {**found, "states_apart": apart, "padded_tokens": inputs["input_ids"].numel()}


def hundred(_: Path) -> dict[str, Any]:
    """Seconds of attaching and of switching, all together."""
    ours, theirs = (body() for _ in range(2))
    linear = "query|key|value|dense"
    config = peft.LoraConfig(r=8, target_modules=rf".*layer\..*({linear})")
    adapters: list[Adapter] = []
    with quietly():
        first = peft.get_peft_model(theirs, config, adapter_name="a0")
    names = [f"a{number}" for number in range(100)]
    seconds = {
        "attach": {
            "smidgen": seconds_of(lambda: adapters.extend(attach(ours, LoRA(), name=name) for name in names)),
            "peft": seconds_of(lambda: [first.add_adapter(name, config) for name in names[1:]]),
        },
        "switch": {
            "smidgen": seconds_of(lambda: [adapter.activate() for adapter in adapters]),
            "peft": seconds_of(lambda: [first.set_adapter(name) for name in names]),
        },
    }
    ratio = {act: round(own["smidgen"] / own["peft"], 3) for act, own in seconds.items()}
    return {"seconds": seconds, "ratio": ratio, "places": len(adapters[0].places[0])}


CASES: dict[str, Callable[[Recipes], dict[str, Any]]] = {
    "step-minilm": lambda recipes: step(recipes["minilm"], 32),
    "step-smollm2": lambda recipes: step(recipes["smollm2"], 8, every_token=True),
    "answers": lambda recipes: step(recipes["smollm2"], 8),
    "activations": lambda recipes: activations(recipes["smollm2"], 8),
    "mixed-8": lambda recipes: mixed(recipes["minilm"], 8),
    "mixed-32": lambda recipes: mixed(recipes["minilm"], 32),
    "recipe": lambda recipes: recipe(recipes["minilm"], 2000),
    "answers-recipe": lambda recipes: recipe(recipes["smollm2"], 200),
    "top-third": lambda recipes: top_third(recipes["minilm"]),
    "eight": lambda recipes: eight(recipes["minilm"]),
    "one-pass": lambda recipes: one_pass(recipes["minilm"]),
    "hundred": lambda recipes: hundred(recipes["minilm"]),
}


if __name__ == "__main__":
    keep_cases(__doc__, CASES, threads=torch.get_num_threads(), device=device_name())
