"""Adapters train inside Hugging Face's Trainer: only what they name, with their schedules and their rates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from smidgen import METHODS, AdaLoRA, LoRAPlus, attach, parameter_groups
from tests.conftest import build, example, make_batch

STEPS = 4


def rows() -> list[dict[str, torch.Tensor]]:
    batch = make_batch("bert", rows=8)
    return [{key: value[row] for key, value in batch.items()} for row in range(8)]


def trainer(folder: Path, model: torch.nn.Module, **more: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), **more)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "lora-plus"])
def test_trainer_trains_the_adapter_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = build("bert")
    method = example(name, "bert")
    if not method.keeps_base:
        method = dataclasses.replace(method, keep_base=True)
    adapter = attach(model, method)
    adapter.clock.steps = STEPS
    trained = {id(parameter) for parameter in adapter.parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(tmp_path, model).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= {n for n, p in model.named_parameters() if id(p) in trained}


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_runs_by_itself(tmp_path: Path) -> None:
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=4, interval=1))
    adapter.clock.steps = STEPS
    trainer(tmp_path, model).train()
    assert adapter.clock.step == STEPS
    assert sum(int(delta.mask.sum()) for delta in adapter.deltas[0]) == 2 * len(adapter.deltas[0])


@pytest.mark.filterwarnings("ignore")
def test_rates_of_their_own_come_in_by_the_optimizer(tmp_path: Path) -> None:
    model = build("bert")
    adapter = attach(model, LoRAPlus(rank=2))
    with pytest.raises(RuntimeError, match="parameter_groups"):
        trainer(tmp_path, model).train()
    optimizer = torch.optim.AdamW(parameter_groups(adapter, 1e-3))
    trainer(tmp_path, model, optimizers=(optimizer, None)).train()
    assert adapter.clock.step == STEPS
