"""Two processes of `accelerate launch` (gloo, on the CPU) train what one process trains, and read its checkpoints."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.process.job import Job
from smidgen.process.opening import reopen
from tests.process.tiny import save_recipe
from tests.process.worker import run

LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
MODES = {"data parallel": ["--multi_gpu"], "sharded": ["--use_fsdp", "--fsdp_version=2"]}

ENCODER = """
training:
  {epochs: 2, batch_size: 7, micro_batch_size: 2, learning_rate: 0.01, weight_decay: 0.1, checkpoint_minutes: null}
"""  # 48 rows: the last batch has 6, in pieces of 2 and 1 for each process
DECODER = """
training: {epochs: 2, batch_size: 47, learning_rate: 0.01, checkpoint_minutes: null}
"""  # the last batch has one row, and a process is idle
JOBS = {
    "lora": ("encoder", "technique=lora"),
    "full": ("encoder", "technique=full"),
    "shared by all layers": ("encoder", "technique={name: prefix-tuning, hidden_size: 8, start: random}"),
    "decoder": ("decoder", "technique=lora"),
    "a trunk": ("encoder", "technique={name: lora, layers: 'last:1'}"),
    "a prompt": ("decoder", "technique={name: prompt-tuning, length: 3, start: random}"),
}
STOPPED = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, and what one process makes of them, whole and stopped."""
    folder = tmp_path_factory.mktemp("distributed")
    save_recipe(folder / "encoder", ENCODER)
    save_recipe(folder / "decoder", DECODER, decoder=True)
    for name in JOBS:
        train(folder, name, "one process")
    for name in ("lora", "full"):
        train(folder, name, "one process, stopped", stop_at=STOPPED)
    return folder


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, folder: Path) -> str:
    launch(folder, request.param)
    return str(request.param)


@functools.cache
def launch(folder: Path, mode: str) -> None:
    """Let two processes train the same recipes, and go on from the checkpoints of one."""
    entries = [entry(folder, name, mode) for name in JOBS]
    entries += [entry(folder, name, f"{mode}, stopped", stop_at=STOPPED) for name in ("lora", "full")]
    for name in ("lora", "full"):
        handed_over = folder / f"{name}, {mode}, resumed from one process"
        copy(folder / f"{name}, one process, stopped", handed_over)
        entries.append(entry(folder, name, f"{mode}, resumed from one process", resume=True))
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(entries))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *LAUNCH, *MODES[mode], "-m", "tests.process.worker", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    facts = json.loads(path.with_suffix(".facts").read_text())
    for fact in facts:
        assert fact["processes"] == 2
        assert fact["sharded"] == (mode == "sharded")
        assert 0.4 < fact["held"] < 0.7 if mode == "sharded" else fact["held"] == 1, fact


def entry(folder: Path, name: str, how: str, *, resume: bool = False, stop_at: int | None = None) -> dict:
    kind, technique = JOBS[name]
    changes = [technique, f"output='{folder / f'{name}, {how}'}'"]
    return {"recipe": str(folder / kind / "recipe.yaml"), "changes": changes, "resume": resume, "stop_at": stop_at}


def train(folder: Path, name: str, how: str, *, resume: bool = False, stop_at: int | None = None) -> Job:
    return run(**entry(folder, name, how, resume=resume, stop_at=stop_at))


def copy(stopped: Path, other: Path) -> None:
    (other / "checkpoint").mkdir(parents=True)
    for part in (
        "log.jsonl",
        "recipe.yaml",
        *(f"checkpoint/{file.name}" for file in (stopped / "checkpoint").iterdir()),
    ):
        (other / part).write_bytes((stopped / part).read_bytes())


def assert_same_run(ours: Path, theirs: Path) -> None:
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    assert len(logs[0]) == len(logs[1])
    for our_line, their_line in zip(*logs, strict=True):
        assert our_line == pytest.approx(their_line, rel=2e-4, abs=2e-5)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (ours, theirs)]
    assert metrics[0]["test"]["loss"] == pytest.approx(metrics[1]["test"]["loss"], rel=2e-4)
    for field in ("steps", "tokens", "trained", "total", "best_epoch"):
        assert metrics[0][field] == metrics[1][field]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_have_the_losses_of_one(folder: Path, mode: str, name: str) -> None:
    assert_same_run(folder / f"{name}, {mode}", folder / f"{name}, one process")


@pytest.mark.parametrize("name", JOBS)
def test_the_adapter_that_two_processes_saved_answers_the_same_in_one(folder: Path, mode: str, name: str) -> None:
    run = folder / f"{name}, {mode}"
    said = json.loads((run / "metrics.json").read_text())["test"]
    assert reopen(run).evaluate()["loss"] == pytest.approx(said["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(folder: Path, mode: str, name: str) -> None:
    train(folder, name, f"{mode}, stopped", resume=True)
    assert_same_run(folder / f"{name}, {mode}, stopped", folder / f"{name}, one process")


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_checkpoint_of_one_process_goes_on_in_two(folder: Path, mode: str, name: str) -> None:
    assert_same_run(folder / f"{name}, {mode}, resumed from one process", folder / f"{name}, one process")
