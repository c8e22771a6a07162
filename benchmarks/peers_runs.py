"""Whole runs of ours and of peft's, side by side: what peers.py does not measure by the step. No command itself."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from pair import AGREES, ROUNDS, Pair, as_transformers, looking_back, perturb
from side_by_side import DEVICE, agreement, alternated, now
from torch import Tensor

from smidgen import attach, rows
from smidgen.process.batches import WholeEpochs, collate, order
from smidgen.process.encoding import pad_id
from smidgen.process.evaluate import row_losses
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.job import Job
from smidgen.process.onednn import exact_onednn
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.shelf import Shelf
from smidgen.process.train import train
from smidgen.trunk import Trunk

SOME = ("data.rows=2000",)
LAST_TWO = ("technique={name: lora, layers: 'last:2'}", "training.frozen_dropout=false")


def recipe(path: Path, count: int) -> dict[str, Any]:
    """Real tokens a second; no evaluation, the same rows, each side's own batches, schedule and clipping."""
    some = f"data.rows={count}"
    job = prepare(load_recipe(path, ["technique=lora", "training.epochs=1", some]))
    own = job.splits["train"]
    began = now()
    trained(job)
    ours = now() - began
    tokenizer, options = job.tokenizer, {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    collators = {False: transformers.DataCollatorWithPadding, True: transformers.DataCollatorForSeq2Seq}
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=Pair(path, 32, some).theirs,
            args=transformers.TrainingArguments(folder, num_train_epochs=1, **options),
            train_dataset=[{"input_ids": row.input_ids, "labels": looking_back(row)} for row in own],
            data_collator=collators[isinstance(own[0].labels, list)](tokenizer),
        )
        began = now()
        trainer.train()
        theirs = now() - began
    tokens = sum(len(row.input_ids) for row in own)
    speed = {"smidgen": round(tokens / ours), "peft with Trainer": round(tokens / theirs)}
    return {"tokens_per_second": speed, "ratio": round(theirs / ours, 3)}


def top_third(path: Path) -> dict[str, Any]:
    """Seconds of five epochs with the optimizer's steps, kept states included; no frozen block drops out."""
    changes = (*LAST_TWO, "training.epochs=5", *SOME)
    seconds, losses = {}, {}
    for name, kept in (("smidgen", "exact"), ("smidgen, states off", "off")):
        job = prepare(load_recipe(path, [*changes, f"training.frozen_states={kept}"]))
        began = now()
        losses[name] = trained(job)
        seconds[name] = round(now() - began, 3)
    for name, kernels in (("peft by oneDNN", exact_onednn(DEVICE)), ("peft", contextlib.nullcontext())):
        pair = Pair(path, 32, *changes)
        began = now()
        with kernels:
            losses[name] = peft_epochs(pair, 5)
        seconds[name] = round(now() - began, 3)
    ratio = {name: round(own / seconds["peft"], 3) for name, own in seconds.items()}
    return {"seconds": seconds, "ratio": ratio, "train_loss": losses}


def peft_epochs(pair: Pair, epochs: int) -> float:
    """A plain loop with peft's model over the same batches, at one rate; the mean loss of the last epoch."""
    learned = [parameter for parameter in pair.theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, fused=True)
    pair.theirs.train()
    bert = pair.theirs.base_model.model.bert
    bert.embeddings.eval(), bert.encoder.layer[:-2].eval()
    for epoch in range(epochs):
        losses = []
        for batch in pair.epoch(epoch):
            loss = pair.theirs(**as_transformers(batch, pair.pad)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def eight(path: Path) -> dict[str, Any]:
    """Seconds of eight runs; each is what it is alone, but for the rounding of another padding."""
    changes = (*LAST_TWO, "data.rows=1000")
    seconds, losses = {}, {}
    for kept in ("exact", "off"):
        wanted = [f"training.frozen_states={kept}", *changes]
        with tempfile.TemporaryDirectory() as folder:
            began = now()
            losses[kept] = [
                trained(prepare(load_recipe(path, [*wanted, f"training.seed={seed}"])), Path(folder))
                for seed in range(8)
            ]
            seconds[kept] = round(now() - began, 3)
    apart = max(abs(one - other) for one, other in zip(losses["exact"], losses["off"], strict=True))
    ratio = {"ratio": round(seconds["off"] / seconds["exact"], 3), "losses_apart": apart}
    return {"seconds": seconds, **ratio, "padded_tokens": padded(prepare(load_recipe(path, changes)))}


def padded(job: Job) -> dict[str, int]:
    """An epoch's tokens of eight seeds: each batch filled up by itself, or the eight of a step together."""
    lengths = [len(row.input_ids) for row in job.splits["train"]]
    orders = [order(lengths, job.recipe.training.batch_size, seed=seed, epoch=0) for seed in range(8)]
    alone = together = 0
    for step in zip(*orders, strict=True):
        longest = [max(lengths[row] for row in batch) for batch in step]
        alone += sum(len(batch) * tokens for batch, tokens in zip(step, longest, strict=True))
        together += sum(map(len, step)) * max(longest)
    return {"alone": alone, "together": together}


def one_pass(path: Path) -> dict[str, Any]:
    """Eight adapters' loss and gradients on the same rows, above their states: in turn, and in one pass.

    One adapter's over as many rows is what no pass of eight can be faster than. Nothing drops out.
    """
    job = prepare(load_recipe(path, [*LAST_TWO, "data.rows=1000"]))
    model = job.model.eval()
    more = [attach(model, job.recipe.technique.methods(), name=f"a{number}") for number in range(1, 8)]
    adapters = [job.adapter, *more]
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters:
        perturb(adapter, generator)
    typical = sorted(job.splits["train"], key=lambda row: len(row.input_ids))[500:532]
    inputs = {name: tensor.to(DEVICE) for name, tensor in collate(typical, pad_id(job.tokenizer)).items()}
    eightfold = {name: torch.cat([tensor] * len(adapters)) for name, tensor in inputs.items()}
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    trunk = Trunk.of(model, texts)
    assert trunk is not None
    states = trunk.states(texts)
    eightfold_states = torch.cat([states] * len(adapters))
    names = [adapter.name for adapter in adapters for _ in typical]

    def learn(inputs: dict[str, Tensor], states: Tensor) -> None:
        with exact_onednn(DEVICE), trunk.given(states):
            (row_losses(model, inputs, "fp32").sum() / len(typical)).backward()

    def clear() -> None:
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.grad = None

    def in_turn(_: int) -> None:
        clear()
        for adapter in adapters:
            adapter.activate()
            learn(inputs, states)

    def together(_: int) -> None:
        clear()
        with rows(model, names):
            learn(eightfold, eightfold_states)

    def by_one(_: int) -> None:
        clear()
        adapters[0].activate()
        learn(eightfold, eightfold_states)

    def gradients() -> dict[str, Tensor]:
        named = ((own.name, name, p.grad) for own in adapters for name, p in own.named_parameters())
        return {f"{own} {name}": gradient for own, name, gradient in named if gradient is not None}

    in_turn(0)
    expected = gradients()
    together(0)
    apart = agreement(gradients(), expected)
    if apart > AGREES:
        raise SystemExit(f"no fair comparison: gradients {apart:.1e} apart")
    found = alternated({"one pass": together, "one pass of one adapter": by_one, "in turn": in_turn}, ROUNDS)
    return {**found, "gradients_apart": apart, "padded_tokens": eightfold["input_ids"].numel()}


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
