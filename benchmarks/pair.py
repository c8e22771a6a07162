"""The same model twice, with our LoRA and with peft's, for benchmarks that set them side by side: no command itself."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from side_by_side import DEVICE, agreement, now
from torch import Tensor

from smidgen import Adapter, embedded, save_peft
from smidgen.placeholders import IGNORED
from smidgen.process.batches import collate, order
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.models import quietly
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.train import backward

ROUNDS = 20
AGREES = 1e-5 if DEVICE.type == "cpu" else 1e-4
"""A GPU's products add up in an order that hangs on their size."""


def perturb(adapter: Adapter, generator: torch.Generator) -> None:
    """Move LoRA's factors from their start, at which half of their gradients are 0."""
    for name, parameter in adapter.named_parameters():
        if ".lora." in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(DEVICE)


class Pair:
    """The same model twice, with the same LoRA on all linear layers: ours and peft's; and batches of its rows."""

    def __init__(self, recipe: Path, rows_at_once: int, *changes: str) -> None:
        wanted = load_recipe(recipe, ["technique=lora", *changes])
        self.job, other = prepare(wanted), prepare(wanted)
        perturb(self.job.adapter, torch.Generator().manual_seed(0))
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
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
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
    tensors = collate([dataclasses.replace(row, labels=looking_back(row)) for row in batch], pad)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def looking_back(row: Encoded) -> int | list[int]:
    """A row's labels as transformers' models take them: each token is its own label, and they look one back."""
    return row.labels if isinstance(row.labels, int) else [IGNORED, *row.labels[:-1]]


def body() -> Any:
    """MiniLM without a head."""
    return transformers.AutoModel.from_pretrained(embedded.model_folder("minilm")).to(DEVICE).eval()


def seconds_of(act: Callable[[], object]) -> float:
    """The seconds of an act, see `now`."""
    began = now()
    act()
    return round(now() - began, 3)
