"""A comparison runs each technique in its own process, goes on where it stopped, and follows from its numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smidgen.errors import UserError
from smidgen.process import runs
from smidgen.process.compare import _called, _mean_rows, compare
from smidgen.process.recipe import load_recipe
from smidgen.process.runs import Run, execute, what_went_wrong
from smidgen.process.signals import stoppable
from smidgen.process.technique import TechniqueSpec
from tests.process.tiny import save_recipe

RECIPE = """\
training: {epochs: 2, batch_size: 8, learning_rate: 0.01, head_learning_rate: 0.01}
compare: [full, lora, {name: lora, rank: 32, targets: query}]
seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One small comparison, shared by the tests that read it."""
    path = save_recipe(tmp_path_factory.mktemp("compare"), RECIPE)
    seen = []
    result = compare(load_recipe(path), command="smidgen compare recipe.yaml", watch=lambda now: seen.append(str(now)))
    assert any("'progress'" in now for now in seen)
    return path, result


def test_every_technique_has_its_numbers(done: tuple[Path, dict]) -> None:
    path, result = done
    assert json.loads((path.parent / "out" / "compare.json").read_text()) == result
    assert [row["name"] for row in result["techniques"]] == ["full", "lora", "lora-rank-32-targets-query"]
    for row in result["techniques"]:
        assert row["status"] == "done"
        assert len(row["scores"]) == 2
        assert row["score"] == pytest.approx(sum(row["scores"]) / 2)
        assert row["low"] <= row["score"] <= row["high"]
        assert row["peak_memory_bytes"] > 10_000_000
        assert row["seconds"] > 0
        runs = [
            json.loads(path.read_text()) for path in (path.parent / "out/runs").glob(f"{row['name']}-s?/metrics.json")
        ]
        assert row["confusion"][1][0] == sum(run["test"]["confusion"][1][0] for run in runs)
        assert row["per_class"][1]["f1"] == pytest.approx(sum(run["test"]["per_class"][1]["f1"] for run in runs) / 2)
        assert row["curve"][0]["train_loss"] == pytest.approx(sum(run["curve"][0]["train_loss"] for run in runs) / 2)
        assert "progress" not in row
    full, lora, _ = result["techniques"]
    assert lora["difference"] == pytest.approx(lora["score"] - full["score"])
    assert lora["difference_low"] <= lora["difference"] <= lora["difference_high"]
    assert lora["trained"] < full["trained"]
    assert lora["disk_bytes"] < full["disk_bytes"]
    assert full["difference"] is None
    assert result["advice"]


def test_all_techniques_see_the_same_rows(done: tuple[Path, dict]) -> None:
    runs = [json.loads(path.read_text()) for path in (done[0].parent / "out" / "runs").glob("*/metrics.json")]
    assert len(runs) == 6
    assert len({run["data"] for run in runs}) == 1
    assert {tuple(run["test"]["targets"]) for run in runs} == {tuple(runs[0]["test"]["targets"])}


def test_a_second_call_measures_nothing_again(done: tuple[Path, dict]) -> None:
    path, result = done
    files = {file: file.stat().st_mtime_ns for file in (path.parent / "out" / "runs").glob("*/metrics.json")}
    again = compare(load_recipe(path), command="smidgen compare recipe.yaml")
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert again["techniques"] == result["techniques"]


def test_a_comparison_of_something_else_is_not_replaced(done: tuple[Path, dict]) -> None:
    path, result = done
    with pytest.raises(UserError, match=r"another recipe \(training.epochs was 2 and is 1\). Remove it, or give"):
        compare(load_recipe(path, ["training.epochs=1"]), command="")
    rows = path.parent / "rows.csv"
    kept = rows.read_text("utf-8")
    rows.write_text(kept + "the day is a new one,yes\n", "utf-8")
    try:
        with pytest.raises(UserError, match="rows of the data have changed"):
            compare(load_recipe(path), command="")
    finally:
        rows.write_text(kept, "utf-8")
    kept_results = json.loads((path.parent / "out" / "compare.json").read_text())
    assert kept_results["techniques"] == result["techniques"]


def test_a_comparison_may_grow_and_shrink(done: tuple[Path, dict]) -> None:
    path, result = done
    again = compare(load_recipe(path, ["compare=[lora]"]), command="")
    assert again["techniques"][0]["scores"] == result["techniques"][1]["scores"]
    assert "Add full to" in again["advice"]
    compare(load_recipe(path), command="smidgen compare recipe.yaml")


def test_entries_that_cannot_be_trained_are_all_named_before_anything_runs(tmp_path: Path) -> None:
    entries = "compare: [lora, {name: lora, rank: 33}, {name: dora, targets: nowhere}]\n"
    with pytest.raises(UserError) as refused:
        compare(load_recipe(save_recipe(tmp_path, entries)), command="")
    assert "rank 33 is above the size" in str(refused.value)
    assert "nowhere" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_several_at_once_measure_the_same(done: tuple[Path, dict], tmp_path: Path) -> None:
    _, one_by_one = done
    recipe = load_recipe(save_recipe(tmp_path, RECIPE))
    both: list[int] = []

    def watch(now: dict) -> None:
        both.append(sum(row["status"] == "running" for row in now["techniques"]))

    result = compare(recipe, command="", at_once=3, watch=watch)
    assert max(both) > 1
    for ours, theirs in zip(result["techniques"], one_by_one["techniques"], strict=True):
        assert ours["scores"] == theirs["scores"]
        assert (ours["difference_low"], ours["difference_high"]) == (
            theirs["difference_low"],
            theirs["difference_high"],
        )


def test_a_failed_seed_leaves_out_the_others_of_its_technique(tmp_path: Path) -> None:
    path = save_recipe(
        tmp_path, "training: {epochs: 1}\ncompare: [{name: lora, learning_rate: 1.0e+30}]\nseeds: [0, 1, 2]\n"
    )
    (lora,) = compare(load_recipe(path), command="", at_once=2)["techniques"]
    assert lora["status"] == "failed"
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_a_run_that_leaves_no_result_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(runs: list[Run], **calls: Any) -> list[Run]:
        calls["ended"](runs[0], None)
        return []

    monkeypatch.setattr("smidgen.process.compare.execute", execute)
    path = save_recipe(tmp_path, "training: {epochs: 1}\ncompare: [lora]\n")
    (lora,) = compare(load_recipe(path), command="")["techniques"]
    assert lora["status"] == "failed"
    assert "without results on these rows" in lora["error"]


def test_a_technique_that_fails_leaves_the_others(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, "training: {epochs: 1}\ncompare: [{name: lora, learning_rate: 1.0e+30}, head]\n")
    result = compare(load_recipe(path), command="smidgen compare recipe.yaml")
    lora, head = result["techniques"]
    assert lora["status"] == "failed"
    assert "Lower training.learning_rate" in lora["error"]
    assert head["status"] == "done"


def test_full_fine_tuning_is_the_baseline_whatever_its_options(tmp_path: Path) -> None:
    entries = "compare: [head, {name: full, learning_rate: 0.01}, {name: full, learning_rate: 0.02}]\n"
    result = compare(load_recipe(save_recipe(tmp_path, f"training: {{epochs: 1}}\n{entries}")), command="")
    head, full, other = result["techniques"]
    assert result["baseline"] == full["name"] == "full-learning_rate-0.01"
    assert head["difference"] == pytest.approx(head["score"] - full["score"])
    assert other["difference"] == pytest.approx(other["score"] - full["score"])
    assert result["recommended"] != other["name"]


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (-9, "epoch 1", "SIGKILL), probably because the memory did not suffice. Lower training.micro_batch_size"),
        (-11, "", "ended by signal 11 (Segmentation fault)"),
        (2, "a warning\nsmidgen: r.yaml has 2 mistakes:\n  one\n  two", "r.yaml has 2 mistakes:\n  one\n  two"),
        (1, "Traceback (most recent call last):\n  ...\nValueError: odd", "ValueError: odd"),
        (1, "", "status 1 and said nothing"),
    ],
)
def test_what_a_run_failed_of_is_said_in_full(status: int, said: str, told: str) -> None:
    assert told in what_went_wrong(status, said)


def test_signals_are_noted_and_insisting_is_heard() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as noted:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_there_are_no_signals() -> None:
    def enter() -> list[int]:
        with stoppable() as noted:
            return noted

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    save_recipe(tmp_path, "training: {epochs: 400, batch_size: 8}\ncompare: [head, lora]\n")
    command = [sys.executable, "-m", "smidgen", "compare", "recipe.yaml"]
    environment = {**os.environ, "COLUMNS": "80"}
    first = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    log = tmp_path / "out" / "runs" / "head-s0" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(first.pid, number)  # a SIGTERM comes to the parent alone
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "Go on with the same command: smidgen compare recipe.yaml" in errors
    assert (tmp_path / "out" / "runs" / "head-s0" / "checkpoint").is_dir()
    shorter = [*command, "--json"]
    second = subprocess.run(shorter, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    result = json.loads(second.stdout)
    assert [row["status"] for row in result["techniques"]] == ["done", "done"]


@pytest.mark.parametrize(("skip", "ended"), [(True, 2), (False, 4)])
def test_a_failure_leaves_out_the_seeds_of_its_technique_only_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool, ended: int
) -> None:
    class Ended:
        """A process that has ended, with an error if it was for LoRA."""

        def __init__(self, run: Run, at_once: int) -> None:
            self.run = run

        def has_ended(self) -> bool:
            return True

        def stop(self) -> None:
            """Nothing is left to stop."""

        def error(self) -> str | None:
            return "failed" if self.run.spec.name == "lora" else None

    monkeypatch.setattr(runs, "_Process", Ended)
    recipe = load_recipe(save_recipe(tmp_path))
    entries = (("lora", 0), ("lora", 1), ("lora", 2), ("head", 0))
    wanted = [Run.of(recipe, TechniqueSpec.parse(name), seed) for name, seed in entries]
    told: list[str] = []
    left = execute(
        wanted, ended=lambda run, _: told.append(run.folder.name), watch=lambda _: None, skip_after_failure=skip
    )
    assert left == []
    assert len(told) == ended
    assert told[-1] == "head-s0"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("hub:owner/name@train", "name"),
        ("bank/train.csv", "bank"),
        ("data/tweets.jsonl", "tweets"),
        ("embedded:minilm", "minilm"),
        ("models/v1.2/", "v1.2"),
    ],
)
def test_a_model_and_a_data_set_are_called_by_their_names(source: str, name: str) -> None:
    assert _called(source) == name


def test_a_mean_curve_goes_on_when_one_seed_has_lost_its_patience() -> None:
    short = [{"epoch": 1.0, "validation": 0.5}]
    long = [{"epoch": 1.0, "validation": 0.7}, {"epoch": 2.0, "validation": 0.9}]
    assert _mean_rows([short, long]) == [{"epoch": 1.0, "validation": 0.6}, {"epoch": 2.0, "validation": 0.9}]


def test_entries_of_one_technique_are_told_apart(tmp_path: Path) -> None:
    text = "compare: [full, lora, {name: lora, rank: 4}]\n"
    recipe = load_recipe(save_recipe(tmp_path, text))
    titles = [recipe.title_of(spec) for spec in recipe.compare]
    assert titles == ["Full fine-tuning", "LoRA (as it is)", "LoRA (rank-4)"]
