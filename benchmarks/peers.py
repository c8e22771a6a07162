"""smidgen and peft on the same machine, in the same run, with the same weights and batches of real text.

    python benchmarks/peers.py FOLDER/banking77.yaml examples/questions.yaml RESULTS.json [--only mixed]

The recipes are those of examples/, banking77's with its data beside it. Before anything is timed, losses and gradients
must agree. Seconds are the processor's, one thread, both ways in turn.

step-minilm: a training step of LoRA on all linear layers, 32 rows of banking77, grouped by length.
step-smollm2: the same of SmolLM2, 8 questions with their answers, every token learned.
answers: the same, the answers alone learned; peft's model computes the vocabulary at every token.
activations: what such a step keeps for its backward pass, of a base in bf16; peft by itself, and under autocast.
mixed-8, mixed-32: a forward pass over 32 rows, each with one of so many LoRA adapters, over the base model's own.
recipe: an epoch over 2,000 rows of banking77 as a user runs it: our recipe's defaults, and peft with Trainer's.
answers-recipe: the same of 200 questions with their answers and SmolLM2.
top-third: five epochs over them with LoRA in the last two of six blocks: states kept, and peft with the same batches.
eight: eight seeds of it, three epochs of 1,000 rows, the model loaded for each; states kept by the first, or by none.
hundred: a hundred LoRA adapters attached to MiniLM, and each made the active one in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from side_by_side import agreement, alternated, roof
from torch import Tensor

from smidgen import Adapter, LoRA, attach, embedded, rows, save_peft
from smidgen.files import read_json, write_json
from smidgen.placeholders import IGNORED
from smidgen.process.batches import WholeEpochs, collate, order
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.job import Job, prepare
from smidgen.process.models import quietly
from smidgen.process.onednn import exact_onednn
from smidgen.process.recipe import load_recipe
from smidgen.process.shelf import Shelf
from smidgen.process.train import backward, train
from smidgen.process.trial import counted

CPU = torch.device("cpu")
ROUNDS = 20
AGREES = 1e-5
SOME = ("data.rows=2000",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default=",".join(CASES))
    chosen = parser.parse_args()
    recipes = {"minilm": chosen.banking77, "smollm2": chosen.questions}
    for case in chosen.only.split(","):
        found = CASES[case](recipes)
        results = read_json(chosen.results) if chosen.results.exists() else {}
        write_json(chosen.results, {**results, case: {**found, "threads": torch.get_num_threads()}})
        print(case, found, flush=True)


class Pair:
    """The same model twice, with the same LoRA on all linear layers: ours and peft's; and batches of its rows."""

    def __init__(self, recipe: Path, rows_at_once: int, *changes: str) -> None:
        wanted = load_recipe(recipe, ["technique=lora", *changes])
        self.job, other = prepare(wanted), prepare(wanted)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.job.adapter.named_parameters():
            if ".lora." in name:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        with tempfile.TemporaryDirectory() as folder, quietly():
            save_peft(self.job.adapter, Path(folder) / "lora")
            other.adapter.detach()
            self.theirs = peft.PeftModel.from_pretrained(other.model, str(Path(folder) / "lora"), is_trainable=True)
        self.ours, self.pad = self.job.model, pad_id(self.job.tokenizer)
        self.rows_at_once = rows_at_once
        self.batches = self.epoch(0)[:ROUNDS]

    def epoch(self, number: int) -> list[list[Encoded]]:
        """The batches of an epoch."""
        found = self.job.splits["train"]
        batches = order([len(row.input_ids) for row in found], self.rows_at_once, seed=0, epoch=number)
        return [[found[row] for row in batch] for batch in batches]

    def step(self, number: int) -> float:
        """Loss and gradients of a batch, our way."""
        self.ours.zero_grad(set_to_none=True)
        return backward(self.ours, self.batches[number], self.job.recipe.training, self.pad)

    def peft_step(self, number: int, *, autocast: bool = False) -> float:
        """The same, as a loop with peft does it."""
        self.theirs.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = self.theirs(**as_transformers(self.batches[number], self.pad)).loss
        loss.backward()
        return float(loss.detach())

    def check(self) -> dict[str, Any]:
        """That the losses and gradients of the first batch agree; how far apart they are."""
        self.ours.eval(), self.theirs.eval()
        losses = self.step(0), self.peft_step(0)
        ours = {_place(name): p.grad for name, p in self.job.adapter.named_parameters() if ".lora." in name}
        theirs = {_place(name): p.grad for name, p in self.theirs.named_parameters() if ".lora_" in name}
        apart = agreement(ours, theirs)
        if abs(losses[0] - losses[1]) > AGREES * losses[1] or apart > AGREES:
            raise SystemExit(f"no fair comparison: losses {losses}, gradients {apart:.1e} apart")
        self.ours.train(), self.theirs.train()
        return {"losses": losses, "gradients_apart": apart}


def _place(name: str) -> str:
    """A factor's layer and letter, of our name LAYER.lora.a or peft's base_model.model.LAYER.lora_A.ADAPTER.weight."""
    layer, _, rest = name.removeprefix("base_model.model.").partition(".lora")
    return f"{layer} {rest[1].lower()}"


def as_transformers(batch: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """A batch as transformers' models take it."""
    return collate([dataclasses.replace(row, labels=looking_back(row)) for row in batch], pad)


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
        with exact_onednn(CPU):
            pair.peft_step(number)

    found = alternated({"smidgen": pair.step, "peft by oneDNN": by_onednn, "peft": pair.peft_step}, ROUNDS)
    return found | agreed | roof_of(pair)


def roof_of(pair: Pair) -> dict[str, Any]:
    """What the machine's products reach, and how many operations of a step's are products with frozen weights."""
    with exact_onednn(CPU):
        gflops = roof()
    linear = sum(p.numel() for name, p in pair.ours.named_parameters() if p.dim() == 2 and "embed" not in name)
    padded = sum(len(batch) * max(len(row.input_ids) for row in batch) for batch in pair.batches) / len(pair.batches)
    return {"roof_gflops": round(gflops, 1), "linear_parameters": linear, "padded_tokens": padded}


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
        with counted() as storages:
            act()
        kept[name] = storages.total()
    return {"bytes": kept, "ratio": {name: round(own / kept["peft"], 3) for name, own in kept.items()}}


def mixed(recipe: Path, adapters: int) -> dict[str, Any]:
    """A forward pass of the model's body over rows of several adapters; peft has the same ones."""
    job = prepare(load_recipe(recipe, ["technique=head"]))
    ours, base, theirs = (body() for _ in range(3))
    typical = sorted(job.splits["train"], key=lambda row: len(row.input_ids))[len(job.splits["train"]) // 2 :][:32]
    inputs = collate(typical, pad_id(job.tokenizer))
    del inputs["labels"]
    names = [f"a{row % adapters}" for row in range(len(typical))]
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, quietly():
        for name in dict.fromkeys(names):
            adapter = attach(ours, LoRA(), name=name)
            for parameter in adapter.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            save_peft(adapter, Path(folder) / name)
            if name == "a0":
                peft_s = peft.PeftModel.from_pretrained(theirs, f"{folder}/{name}", adapter_name=name)
            else:
                peft_s.load_adapter(f"{folder}/{name}", adapter_name=name)

    def alone(_: int) -> Tensor:
        with exact_onednn(CPU):
            return base(**inputs)[0]  # type: ignore[no-any-return]

    def by_rows(_: int) -> Tensor:
        with exact_onednn(CPU), rows(ours, names):
            return ours(**inputs)[0]  # type: ignore[no-any-return]

    def by_names(_: int) -> Tensor:
        with exact_onednn(CPU):
            return peft_s(**inputs, adapter_names=names)[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        apart = agreement({"states": by_rows(0)}, {"states": by_names(0)})
        if apart > AGREES:
            raise SystemExit(f"no fair comparison: states {apart:.1e} apart")
        found = alternated({"smidgen": by_rows, "peft": by_names, "base": alone}, 3 * ROUNDS)
    return {**found, "states_apart": apart, "padded_tokens": inputs["input_ids"].numel()}


def body() -> Any:
    """MiniLM without a head."""
    return transformers.AutoModel.from_pretrained(embedded.model_folder("minilm")).eval()


def recipe(path: Path, rows: int) -> dict[str, Any]:
    """Real tokens a second; no evaluation, the same rows, each side's own batches, schedule and clipping."""
    some = f"data.rows={rows}"
    job = prepare(load_recipe(path, ["technique=lora", "training.epochs=1", some]))
    own = job.splits["train"]
    began = time.process_time()
    trained(job)
    ours = time.process_time() - began
    tokenizer, options = job.tokenizer, {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    collators = {False: transformers.DataCollatorWithPadding, True: transformers.DataCollatorForSeq2Seq}
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=Pair(path, 32, some).theirs,
            args=transformers.TrainingArguments(folder, num_train_epochs=1, **options),
            train_dataset=[{"input_ids": row.input_ids, "labels": looking_back(row)} for row in own],
            data_collator=collators[isinstance(own[0].labels, list)](tokenizer),
        )
        began = time.process_time()
        trainer.train()
        theirs = time.process_time() - began
    tokens = sum(len(row.input_ids) for row in own)
    speed = {"smidgen": round(tokens / ours), "peft with Trainer": round(tokens / theirs)}
    return {"tokens_per_second": speed, "ratio": round(theirs / ours, 3)}


def looking_back(row: Encoded) -> int | list[int]:
    """A row's labels as transformers' models take them: each token is its own label, and they look one back."""
    return row.labels if isinstance(row.labels, int) else [IGNORED, *row.labels[:-1]]


def top_third(path: Path) -> dict[str, Any]:
    """Processor seconds of five epochs with the optimizer's steps, of what is kept as well; the last losses agree."""
    changes = ("technique={name: lora, layers: 'last:2'}", "training.epochs=5", "training.frozen_dropout=false", *SOME)
    seconds, losses = {}, {}
    for name, kept in (("smidgen", "exact"), ("smidgen, states off", "off")):
        job = prepare(load_recipe(path, [*changes, f"training.frozen_states={kept}"]))
        began = time.process_time()
        losses[name] = trained(job)
        seconds[name] = round(time.process_time() - began, 3)
    pair = Pair(path, 32, *changes)
    optimizer = torch.optim.AdamW([p for p in pair.theirs.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def loop() -> None:
        pair.theirs.train()
        for epoch in range(5):
            for batch in pair.epoch(epoch):
                loss = pair.theirs(**as_transformers(batch, pair.pad)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for p in pair.theirs.parameters() if p.requires_grad], 1.0)
                optimizer.step()
                optimizer.zero_grad()

    seconds["peft"] = seconds_of(loop)
    ratio = {name: round(own / seconds["peft"], 3) for name, own in seconds.items()}
    return {"seconds": seconds, "ratio": ratio, "train_loss": losses}


def eight(path: Path) -> dict[str, Any]:
    """Processor seconds of eight runs; each is what it is alone, but for the rounding of another padding."""
    changes = ("technique={name: lora, layers: 'last:2'}", "training.frozen_dropout=false", "data.rows=1000")
    seconds, losses = {}, {}
    for kept in ("exact", "off"):
        wanted = [f"training.frozen_states={kept}", *changes]
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            losses[kept] = [
                trained(prepare(load_recipe(path, [*wanted, f"training.seed={seed}"])), Path(folder))
                for seed in range(8)
            ]
            seconds[kept] = round(time.process_time() - began, 3)
    apart = max(abs(one - other) for one, other in zip(losses["exact"], losses["off"], strict=True))
    return {"seconds": seconds, "ratio": round(seconds["off"] / seconds["exact"], 3), "losses_apart": apart}


def trained(job: Job, folder: Path | None = None) -> float:
    """Train a job without evaluation, with states kept in a folder or for this run alone; its last epoch's loss."""
    training = job.recipe.training
    with tempfile.TemporaryDirectory() as own:
        shelf = Shelf((folder or Path(own)) / "frozen")
        frozen = FrozenStates(job.model, job.adapter, training, pad_id(job.tokenizer), shelf)
        with contextlib.closing(frozen):
            progress = train(
                job.model,
                job.adapter,
                WholeEpochs(job.splits["train"], training.batch_size, training.seed),
                lambda: {"loss": 0.0, job.recipe.metric: 0.0},
                recipe=job.recipe.model_copy(update={"output": own}),
                rates=job.rates,
                pad_id=pad_id(job.tokenizer),
                fingerprint="",
                frozen=frozen,
                quiet=True,
            )
    return float(progress.curve[-1]["train_loss"])


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


def seconds_of(act: Callable[[], object]) -> float:
    """The processor's seconds of an act."""
    began = time.process_time()
    act()
    return round(time.process_time() - began, 3)


Recipes = Mapping[str, Path]
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
    "hundred": lambda recipes: hundred(recipes["minilm"]),
}


if __name__ == "__main__":
    main()
