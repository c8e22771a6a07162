"""Kept states: the same run with them and without, the same bits after a stop, and none where they would differ."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smidgen.errors import Interrupted
from smidgen.process import run as running
from smidgen.process import shelf as shelves
from smidgen.process.frozen_states import FrozenStates, _key
from smidgen.process.job import Job
from smidgen.process.opening import prepare, reopen
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from smidgen.process.shelf import Shelf, StoppedError
from smidgen.report.terminal import plan_lines
from smidgen.trunk import Trunk
from tests.process.test_train import interrupted
from tests.process.tiny import save_recipe

RECIPE = """
technique: {name: lora, layers: "last:1"}
training: {epochs: 3, batch_size: 8, learning_rate: 0.01, head_learning_rate: 0.01, checkpoint_minutes: null,
  frozen_dropout: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return save_recipe(tmp_path, RECIPE)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept states."""
    monkeypatch.setattr(running, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "frozen"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows a trunk computed, each time that it was asked to."""
    counts: list[int] = []
    real = Trunk.states

    def states(self: Trunk, inputs: Any) -> torch.Tensor:
        counts.append(len(inputs["input_ids"]))
        return real(self, inputs)

    monkeypatch.setattr(Trunk, "states", states)
    return counts


def trained(recipe: Path, *changes: str, dropout: float | None = None) -> tuple[dict[str, Any], Job]:
    output = "-".join(("out", *(change.replace("/", "") for change in changes)))
    job = prepare(load_recipe(recipe, (f"output={recipe.parent / output}", *changes)))
    for module in job.model.modules():
        if dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return run(job, quiet=True), job


def difference(first: Job, second: Job) -> float:
    return max(
        float((one - other).detach().abs().max())
        for one, other in zip(first.adapter.parameters(), second.adapter.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("decoder", "technique"),
    [(False, None), (True, None), (False, "head"), (False, '{name: houlsby, layers: "last:1"}')],
)
def test_a_run_is_the_same_with_kept_states_and_without(tmp_path: Path, decoder: bool, technique: str | None) -> None:
    text = RECIPE.replace(" head_learning_rate: 0.01,", "") if decoder else RECIPE
    recipe = save_recipe(tmp_path, text, decoder=decoder)
    more = () if technique is None else (f"technique={technique}",)
    metrics, job = trained(recipe, *more)
    without, other = trained(recipe, "training.frozen_states=off", *more)
    assert metrics["frozen_blocks"] == (2 if technique == "head" else 1)
    assert without["frozen_blocks"] == 0
    assert difference(job, other) < 1e-5
    assert metrics["test"]["loss"] == pytest.approx(without["test"]["loss"], abs=1e-5)


def test_blocks_above_kept_states_may_be_computed_again_in_the_backward_pass(recipe: Path) -> None:
    _, job = trained(recipe, dropout=0.0)  # recomputed blocks draw for all tokens of the last block, others for one
    _, other = trained(recipe, "training.gradient_checkpointing=true", dropout=0.0)
    assert difference(job, other) < 1e-5


def test_a_row_is_computed_once_by_all_runs(recipe: Path, kept: Path, computed: list[int]) -> None:
    _, job = trained(recipe)
    rows = {tuple(row.input_ids) for rows in job.splits.values() for row in rows}
    trials = 4 * 4  # rows on which the trunk is tried: for its shape, whether it is exact, and twice for chance
    assert sum(computed) - trials == len(rows)
    width = job.model.config.hidden_size * 4
    assert sum(file.stat().st_size for file in kept.iterdir()) == sum(map(len, rows)) * width
    computed.clear()
    trained(recipe, "training.seed=1")
    assert sum(computed) == trials


def test_bf16_takes_half_of_the_place_and_is_near(recipe: Path, kept: Path) -> None:
    metrics, _ = trained(recipe)
    exact = sum(file.stat().st_size for file in kept.iterdir())
    for file in kept.iterdir():
        file.unlink()
    rounded, _ = trained(recipe, "training.frozen_states=bf16")
    assert sum(file.stat().st_size for file in kept.iterdir()) == exact / 2
    assert rounded["test"]["loss"] != metrics["test"]["loss"]
    assert rounded["test"]["loss"] == pytest.approx(metrics["test"]["loss"], rel=0.05)


@pytest.mark.parametrize("lost", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(
    recipe: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    _, whole = trained(recipe)
    interrupted(prepare(load_recipe(recipe, [])), 9, monkeypatch)
    for file in kept.iterdir() if lost else ():
        file.unlink()
    resumed = prepare(load_recipe(recipe, []))
    run(resumed, resume=True, quiet=True)
    assert difference(whole, resumed) == 0


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_is_stopped_while_states_are_computed_stops_then(
    recipe: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    _, whole = trained(recipe)
    for file in kept.iterdir():
        file.unlink()
    real, epochs = FrozenStates.keep, itertools.count()

    def keep(self: FrozenStates, rows: Any) -> None:
        if self.model.training and next(epochs) == epoch:
            signal.raise_signal(signal.SIGINT)
        real(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(FrozenStates, "keep", keep)
        with pytest.raises(Interrupted, match=f"Stopped after step {6 * epoch} of 18"):
            run(prepare(load_recipe(recipe, [])), quiet=True)
    if epoch == 0:
        assert not list(kept.iterdir())
    resumed = prepare(load_recipe(recipe, []))
    run(resumed, resume=True, quiet=True)
    assert difference(whole, resumed) == 0


def test_a_trunk_that_drops_out_is_kept_for_scoring_alone(recipe: Path, computed: list[int]) -> None:
    metrics, job = trained(recipe, "training.frozen_dropout=true")
    without, other = trained(recipe, "training.frozen_dropout=true", "training.frozen_states=off")
    assert metrics["frozen_blocks"] == 0
    scored = {tuple(row.input_ids) for split in ("validation", "test") for row in job.splits[split]}
    assert sum(computed) - 2 * 4 == len(scored)
    assert difference(job, other) < 1e-5
    assert metrics["curve"][0]["train_loss"] == without["curve"][0]["train_loss"]


def test_frozen_dropout_decides_about_the_trunk_alone(recipe: Path) -> None:
    def first_loss(*changes: str) -> float:
        return float(trained(recipe, *changes)[0]["curve"][0]["train_loss"])

    everywhere = "technique=lora"
    assert first_loss("training.frozen_dropout=true") != first_loss()
    assert first_loss("training.frozen_dropout=true", everywhere) == first_loss(everywhere)


def test_blocks_that_join_are_computed_from_then_on(recipe: Path) -> None:
    technique = 'technique={name: progressive, embeddings: "last", until: 0.6}'
    metrics, without = (trained(recipe, technique, f"training.frozen_states={kept}")[0] for kept in ("exact", "off"))
    assert metrics["frozen_blocks"] == 1
    losses, others = ([point["train_loss"] for point in found["curve"]] for found in (metrics, without))
    assert losses == pytest.approx(others, abs=1e-4)


def test_the_plan_tells_what_is_kept(recipe: Path, kept: Path) -> None:
    assert prepare(load_recipe(recipe, [])).plan().frozen_blocks == 1
    assert prepare(load_recipe(recipe, ["training.epochs=1"])).plan().frozen_blocks == 0
    noisy = prepare(load_recipe(recipe, ["training.frozen_dropout=true"])).plan()
    assert (noisy.frozen_blocks, noisy.noisy_blocks) == (0, 1)
    assert "  blocks that would be, with training.frozen_dropout=false: 1" in list(plan_lines(noisy))
    assert not kept.exists()  # a plan leaves nothing


def test_a_run_that_stops_within_an_epoch_reports_no_blocks_as_kept(recipe: Path) -> None:
    assert trained(recipe, "training.max_steps=2")[0]["frozen_blocks"] == 0


def test_one_epoch_keeps_nothing(recipe: Path, kept: Path) -> None:
    trained(recipe, "training.epochs=1")
    assert not kept.exists()


def test_too_little_room_is_told_and_changes_nothing(recipe: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "SHARE", 0.0)
    metrics, job = trained(recipe)
    monkeypatch.undo()
    _, other = trained(recipe, "training.frozen_states=off")
    assert difference(job, other) == 0
    assert any("0 % of the disk" in note or "0% of the disk" in note for note in metrics["notes"])
    assert not list(kept.iterdir())


def shelf_with(folder: Path, origin: str, content: bytes) -> str | None:
    with contextlib.closing(Shelf(folder)) as shelf:
        return shelf.put(origin, {b"key": len(content)}, iter([(b"key", memoryview(content))]))


def test_the_file_not_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        assert shelf_with(tmp_path, str(number), bytes(1000)) is None
        for file in tmp_path.iterdir():
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime)
    monkeypatch.setattr(shelves.shutil, "disk_usage", lambda _: SimpleNamespace(free=18_000))
    assert shelf_with(tmp_path, "new", bytes(1000)) is None
    assert len(list(tmp_path.iterdir())) == 2
    assert newest.exists()


def test_a_file_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    shelf_with(tmp_path, "origin", b"0123")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"01")
    shelf = Shelf(tmp_path)
    assert shelf.put("origin", {b"key": 4}, iter([(b"key", memoryview(b"0123"))])) is None
    found = bytearray(4)
    shelf.read(b"key", found)
    shelf.close()
    assert found == b"0123"


def test_of_several_that_want_the_same_one_computes_it(tmp_path: Path) -> None:
    asked: list[int] = []

    def computed() -> Iterator[tuple[bytes, memoryview]]:
        asked.append(1)
        time.sleep(0.2)
        yield b"key", memoryview(b"0123")

    def want(_: int) -> bytes:
        found = bytearray(4)
        with contextlib.closing(Shelf(tmp_path)) as shelf:
            assert shelf.put("origin", {b"key": 4}, computed()) is None
            shelf.read(b"key", found)
        return bytes(found)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(want, range(3))) == [b"0123"] * 3
    assert len(asked) == 1


def test_who_waits_for_another_may_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "PATIENCE", 0.01)
    asked = itertools.count()
    with contextlib.closing(Shelf(tmp_path)) as shelf, contextlib.closing(Shelf(tmp_path)) as other:

        def computed() -> Iterator[tuple[bytes, memoryview]]:
            with pytest.raises(StoppedError):
                other.put("origin", {b"key": 4}, iter(()), stopped=lambda: next(asked) == 3)
            yield b"key", memoryview(b"1234")

        assert shelf.put("origin", {b"key": 4}, computed()) is None
        assert b"key" in shelf
    assert next(asked) == 4


def test_a_stopped_writer_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> Any:
        yield b"key", memoryview(b"0123")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shelf(tmp_path).put("origin", {b"key": 4, b"more": 4}, stopped())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be kept" in (shelf_with(tmp_path / "file" / "inside", "origin", b"0123") or "")


@pytest.mark.parametrize("dropout", ["true", "false"])
def test_a_prefix_is_scored_as_it_is_opened_again(tmp_path: Path, dropout: str) -> None:
    recipe = save_recipe(tmp_path, RECIPE)
    technique = "technique={name: prefix-tuning, layers: 'last:1', length: 4}"
    metrics, job = trained(recipe, technique, f"training.frozen_dropout={dropout}")
    again = reopen(Path(job.recipe.output)).evaluate()
    assert again["loss"] == pytest.approx(metrics["test"]["loss"], abs=1e-6)


def test_a_block_that_joins_drops_out_at_once(recipe: Path, tmp_path: Path) -> None:
    job = prepare(load_recipe(recipe, ['technique={name: progressive, embeddings: "never"}', "training.epochs=3"]))
    rows = job.splits["train"]
    states = FrozenStates(job.model, job.adapter, job.recipe.training, 0, Shelf(tmp_path / "shelf"))
    first, last = (job.model.bert.encoder.layer[block] for block in (0, 1))
    with contextlib.closing(states):
        job.model.train()
        states.keep(rows)
        assert states.depth == 1
        assert (first.output.dropout.training, last.output.dropout.training) == (False, True)
        for parameter in first.parameters():
            parameter.requires_grad_(True)
        states.given(rows[:4])
        assert first.output.dropout.training
        for parameter in first.parameters():
            parameter.requires_grad_(False)
        states.given(rows[:4])
        assert all(_key(row) in states.shelf for row in rows)  # kept again, as by a run that goes on from here
        assert not first.output.dropout.training


def test_what_has_no_room_is_told_though_other_rows_have_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def has_room(_: Shelf, needed: int) -> bool:
        asked.append(needed)
        return needed < max(asked)

    monkeypatch.setattr(Shelf, "_has_room", has_room)
    metrics, _ = trained(recipe)
    assert any("are more than" in note for note in metrics["notes"])
    assert len(asked) == 3  # and not in every epoch


def test_chance_other_than_dropout_is_seen(recipe: Path, tmp_path: Path) -> None:
    job = prepare(load_recipe(recipe, []))
    job.model.bert.encoder.layer[0].register_forward_hook(
        lambda module, _, output: output + 0.1 * torch.randn_like(output) if module.training else output
    )
    training = job.recipe.training.model_copy(update={"frozen_dropout": True})
    states = FrozenStates(job.model, job.adapter, training, 0, Shelf(tmp_path / "shelf"))
    for module in job.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    job.model.train()
    with contextlib.closing(states):
        states.keep(job.splits["train"])
        assert states.depth == 0


def test_a_file_that_is_being_written_makes_no_room(tmp_path: Path) -> None:
    new = tmp_path / ".new.abc"
    new.write_bytes(b"x" * 10)
    shelf = Shelf(tmp_path)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(shelves.shutil, "disk_usage", lambda _: type("", (), {"free": 100})())
    assert shelf._has_room(10)
    assert new.exists()
    monkey.undo()
