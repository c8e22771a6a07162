"""A checkpoint is whole or not there: through crashes, full disks and damage, the one before it counts."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from smidgen.errors import UserError
from smidgen.process import checkpoint
from smidgen.process.checkpoint import Checkpoint
from smidgen.process.recipe import Recipe, load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text("model: embedded:minilm\ndata: {train: rows.csv}\n")
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint"


def kept(folder: Path) -> list[str]:
    """The files in the folder, the part of a name that is different each time left out."""
    return sorted(re.sub(r"(step-\d+)-[0-9a-f]{8}\.safetensors", r"\1", path.name) for path in folder.iterdir())


def stopped(step: int) -> Checkpoint:
    values = torch.full((3, 4), float(step))
    return Checkpoint(
        {"step": step, "seconds": 0.1 + step, "curve": [{"epoch": 1}], "best_score": None},
        weights={"layer.0|a": values, "layer.0.b": torch.tensor(0.5)},
        best={} if step == 1 else {"layer.0|a": values + 1},
        moments={"layer.0|a/exp_avg": values.to(torch.bfloat16), "layer.0|a/step": torch.tensor(float(step))},
    )


def test_what_is_saved_comes_back(folder: Path, recipe: Recipe) -> None:
    checkpoint.save(folder, stopped(2), recipe, "rows")
    loaded = checkpoint.load(folder, recipe, "rows")
    assert loaded.progress == stopped(2).progress
    for part in checkpoint.PARTS:
        ours, theirs = getattr(loaded, part), getattr(stopped(2), part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name])


def test_a_new_checkpoint_replaces_the_one_before(folder: Path, recipe: Recipe) -> None:
    for step in (1, 2):
        checkpoint.save(folder, stopped(step), recipe, "rows")
    assert kept(folder) == ["checkpoint.json", "step-2"]
    assert checkpoint.load(folder, recipe, "rows").progress["step"] == 2


@pytest.mark.parametrize("again", [1, 2], ids=["at the same step", "at a later step"])
@pytest.mark.parametrize("stage", ["save_file", "files.write_json"])
def test_a_crash_while_saving_leaves_the_one_before(
    folder: Path, recipe: Recipe, stage: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(folder, stopped(1), recipe, "rows")

    def crash(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(f"smidgen.process.checkpoint.{stage}", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            checkpoint.save(folder, stopped(again), recipe, "rows")
    assert checkpoint.load(folder, recipe, "rows").progress["step"] == 1
    checkpoint.save(folder, stopped(3), recipe, "rows")
    assert kept(folder) == ["checkpoint.json", "step-3"]


def test_before_the_first_one_is_whole_there_is_none(
    folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("smidgen.files.write_json", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        checkpoint.save(folder, stopped(1), recipe, "rows")
    assert folder.is_dir()
    assert not checkpoint.exists(folder)
    with pytest.raises(UserError, match="There is no checkpoint to resume"):
        checkpoint.load(folder, recipe, "rows")


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_says_how_much_is_needed_and_spares_the_one_before(
    folder: Path, recipe: Recipe, full: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(folder, stopped(1), recipe, "rows")

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"a part")
        raise full

    monkeypatch.setattr(checkpoint, "save_file", write)
    large = Checkpoint({"step": 2}, {"a": torch.zeros(1_000_000)}, {}, {})
    with pytest.raises(UserError, match=r"No space is left .* it needs 4\.0 MB\. The checkpoint before it is whole"):
        checkpoint.save(folder, large, recipe, "rows")
    assert kept(folder) == ["checkpoint.json", "step-1"]
    assert checkpoint.load(folder, recipe, "rows").progress["step"] == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(["json", "safetensors"]))
def test_one_flipped_bit_is_noticed(folder: Path, recipe: Recipe, place: float, bit: int, name: str) -> None:
    checkpoint.save(folder, stopped(2), recipe, "rows")
    (path,) = folder.glob(f"*.{name}")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = checkpoint.load(folder, recipe, "rows")
    except UserError:
        return
    assert name == "json"  # white space between its values says nothing
    assert loaded.progress == stopped(2).progress


def test_a_checkpoint_that_is_cut_short_is_refused(folder: Path, recipe: Recipe) -> None:
    checkpoint.save(folder, stopped(2), recipe, "rows")
    (path,) = folder.glob("step-2-*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-2-.*\.safetensors is missing, or was changed or cut short"):
        checkpoint.load(folder, recipe, "rows")


def test_what_does_not_change_the_result_may_change(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    checkpoint.save(folder, stopped(2), recipe, "rows")
    other = load_recipe(
        tmp_path / "recipe.yaml", ["training.checkpoint_minutes=9", "training.tracker=wandb", "seeds=[4]"]
    )
    assert checkpoint.load(folder, other, "rows").progress["step"] == 2


def test_every_change_of_the_result_is_named(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    checkpoint.save(folder, stopped(2), recipe, "rows")
    other = load_recipe(tmp_path / "recipe.yaml", ["training.seed=1", "data.max_length=9"])
    with pytest.raises(UserError, match=r"data\.max_length was null and is 9; training\.seed was 0 and is 1"):
        checkpoint.load(folder, other, "rows")
    with pytest.raises(UserError, match="The data have changed"):
        checkpoint.load(folder, recipe, "other rows")
