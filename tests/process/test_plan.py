"""The plan counts exactly, estimates from real steps, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smidgen.process import trial
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from tests.process.tiny import save_recipe


def job(folder: Path, *changes: str) -> Job:
    return prepare(load_recipe(save_recipe(folder, "training: {epochs: 2, batch_size: 8}\n"), changes))


@pytest.mark.parametrize("technique", ["lora", "houlsby", "prefix-tuning", "full", "head"])
def test_the_plan_says_what_the_run_then_does(tmp_path: Path, technique: str) -> None:
    planned = job(tmp_path, f"technique={technique}").plan()
    metrics = run(job(tmp_path, f"technique={technique}"), quiet=True)
    assert planned.trainable == metrics["trained"]
    assert planned.trainable + planned.frozen == metrics["total"]
    assert planned.steps == metrics["steps"]
    assert 0 < metrics["disk_bytes"] - planned.disk_bytes < 20_000  # the description
    assert planned.tokens * 2 == metrics["tokens"]
    assert planned.seconds > 0
    assert planned.memory_bytes > 10_000_000


def test_planning_leaves_no_trace(tmp_path: Path) -> None:
    plain, planned = job(tmp_path), job(tmp_path)
    random = torch.get_rng_state()
    before = planned.adapter.state()
    planned.plan()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in planned.adapter.state().items())
    assert all(parameter.grad is None for parameter in planned.model.parameters())
    assert not (tmp_path / "out").exists()
    run(plain, quiet=True)
    run(planned, quiet=True)
    states = [done.adapter.state() for done in (plain, planned)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "change", ["precision=bf16", "gradient_checkpointing=true", "micro_batch_size=3", "micro_batch_tokens=20"]
)
def test_the_trial_is_the_run_s_own_step(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = job(tmp_path, f"training.{change}")
    flags = []
    real = trial.backward

    def watched(*given: object) -> float:
        layer = planned.model.bert.encoder.layer[0]
        flags.append(layer.gradient_checkpointing)
        return real(*given)

    monkeypatch.setattr(trial, "backward", watched)
    assert planned.plan().memory_bytes > 10_000_000
    assert set(flags) == {"gradient_checkpointing" in change}
    assert not planned.model.bert.encoder.layer[0].gradient_checkpointing


def test_a_budget_of_tokens_bounds_what_a_step_keeps(tmp_path: Path) -> None:
    whole, cut = (job(tmp_path, *changes).plan() for changes in ([], ["training.micro_batch_tokens=20"]))
    assert cut.activation_bytes < 0.7 * whole.activation_bytes
    assert cut.steps == whole.steps


def test_matches_are_listed_by_kind(tmp_path: Path) -> None:
    planned = job(tmp_path, "technique={name: lora, targets: attention, layers: last:1}").plan()
    assert "attention.self.query: 1 of 2 blocks" in planned.matched
    head = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert planned.own == head
    own = job(tmp_path, "technique=houlsby").plan().own
    assert any(line.endswith("output.LayerNorm.weight in 2 places") for line in own)


def test_virtual_tokens_are_said(tmp_path: Path) -> None:
    planned = job(tmp_path, "technique={name: prompt-tuning, length: 5}").plan()
    assert planned.virtual_tokens == 5
