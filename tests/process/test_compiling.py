"""Compiled blocks: the same steps, with deltas, kept states and recomputed activations, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from smidgen import LoRA, attach
from smidgen.errors import UserError
from smidgen.process.compiling import compiled_blocks
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb
from tests.process.tiny import save_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),  # of torch's own compiler
]
NO_COMPILER = shutil.which("g++") is None


def job(folder: Path, *changes: str) -> Job:
    return prepare(load_recipe(save_recipe(folder, "training: {epochs: 2, batch_size: 8}\n"), changes))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that are made; they are run as they are, which needs no C++ compiler and little time."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda act, **more: compile_(act, backend=keep, **more))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize(
    "changes",
    [
        ["technique=lora"],
        ["technique=houlsby"],
        ["technique=prompt-tuning"],
        ["technique=prefix-tuning"],
        ["technique={name: lora, layers: 'last:1'}", "training.frozen_dropout=false"],
        ["technique=lora", "training.gradient_checkpointing=true"],
    ],
    ids=["lora", "houlsby", "prompt", "prefix", "kept states", "checkpointing"],
)
def test_a_run_learns_what_it_learns_without(
    tmp_path: Path, changes: list[str], eager: list[torch.fx.GraphModule]
) -> None:
    curves = []
    for wanted in ("false", "true"):
        started = job(tmp_path, *changes, f"training.compile={wanted}", f"output=out-{wanted}")
        for module in started.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # a graph draws in another order
        curves.append(run(started, quiet=True)["curve"])
        assert all(module._compiled_call_impl is None for module in started.model.modules())
    assert eager
    for plain, compiled in zip(*curves, strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
        assert compiled["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("layers", ["all", "last:1", "0"])
def test_a_block_without_deltas_lends_its_graph_to_none_with_some(
    layers: str, eager: list[torch.fx.GraphModule]
) -> None:
    model, batch = build("bert"), make_batch("bert")
    disturb(attach(model, LoRA(layers=layers)))
    with torch.no_grad():
        expected = model(**batch).logits
        with compiled_blocks(model, True):
            torch.testing.assert_close(model(**batch).logits, expected)
    assert len(eager) == (1 if layers == "all" else 2)


@pytest.mark.skipif(NO_COMPILER, reason="there is no C++ compiler, which the CPU's code needs")
def test_code_is_generated(tmp_path: Path) -> None:
    torch._dynamo.reset()
    metrics = run(job(tmp_path, "technique=lora", "training.compile=true", "training.max_steps=2"), quiet=True)
    assert metrics["steps"] == 2


def test_without_a_compiler_or_blocks_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"), compiled_blocks(build("bert"), True):
        pass
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="Linear has no list of blocks"), compiled_blocks(plain, True):  # type: ignore[arg-type]
        pass
