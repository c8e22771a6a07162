"""Text that should not be forgotten: its loss is taken, an epoch that forgets too much ends the run and is not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smidgen.errors import UserError
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.probe import Probe
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from smidgen.process.runs import Run
from smidgen.process.technique import TechniqueSpec
from tests.process.tiny import WORDS, save_recipe

TRAINING = "training: {epochs: 4, batch_size: 8, learning_rate: 0.02, schedule: constant, checkpoint_minutes: null}\n"


LORA = TechniqueSpec.parse("lora")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    (tmp_path / "general.txt").write_text(" ".join(draw.choice(WORDS[:26], 2000)))
    return save_recipe(
        tmp_path, TRAINING + "probe: {text: general.txt, rise: 0.5, blocks: 8, length: 16}\n", decoder=True
    )


def job(path: Path, *changes: str) -> Job:
    return prepare(load_recipe(path, changes))


def test_the_loss_of_the_probe_is_taken_before_and_after_every_epoch(recipe: Path) -> None:
    done = job(recipe, "probe.rise=1000", "training.epochs=2")
    probe = done.probe
    assert probe is not None
    assert [len(row.input_ids) for row in probe.rows] == [16] * 8
    with done.adapter.disabled():
        base = probe.loss()
    metrics = run(done, quiet=True)
    assert metrics["probe"]["before"] == pytest.approx(base)
    assert len(metrics["curve"]) == 2
    assert metrics["probe"]["after"] == metrics["curve"][metrics["best_epoch"] - 1]["probe_loss"]
    assert probe.loss() == pytest.approx(metrics["probe"]["after"])


def test_an_epoch_that_forgets_too_much_ends_the_run_and_is_not_kept(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 2.1, 2.9, 3.1])
    monkeypatch.setattr(Probe, "loss", lambda self: next(losses))
    metrics = run(job(recipe), quiet=True)
    assert [point["probe_loss"] for point in metrics["curve"]] == [2.1, 2.9, 3.1]
    assert metrics["best_epoch"] <= 2
    assert metrics["probe"]["before"] == 2.0
    assert metrics["probe"]["after"] in (2.1, 2.9)


def test_another_text_is_another_run(recipe: Path) -> None:
    run(job(recipe, "probe.rise=1000", "training.epochs=1"), quiet=True)
    finished = Run.of(load_recipe(recipe, ["probe.rise=1000", "training.epochs=1"]), LORA, 0, folder=".")
    data = job(recipe).data.fingerprint()
    assert finished.metrics(data) is not None
    text = recipe.parent / "general.txt"
    text.write_text(text.read_text().replace("a", "b"))
    assert finished.metrics(data) is None
    with pytest.raises(UserError, match=r"holds a finished run with another text: probe\.text has changed since"):
        run(job(recipe, "probe.rise=1000", "training.epochs=1"), quiet=True)
    text.unlink()
    with pytest.raises(UserError, match=r"probe\.text .* names no text file"):
        load_recipe(recipe).text_hash()


def test_a_first_epoch_that_forgets_too_much_is_an_error(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"more than probe\.rise lets it rise"):
        run(job(recipe, "probe.rise=0.0001", "training.learning_rate=0.5"), quiet=True)
    assert not (recipe.parent / "out" / "adapter").exists()


def test_training_rows_that_are_in_the_probe_are_counted(recipe: Path) -> None:
    assert not any("probe.text" in note for note in job(recipe).notes)
    rows = (recipe.parent / "rows.csv").read_text().splitlines()[1:4]
    (recipe.parent / "general.txt").write_text("\n".join(row.replace(",", " ") for row in rows) * 3)
    notes = job(recipe, "probe.length=8").notes
    assert all("probe.text" not in note for note in notes)  # the rows are shorter than what is shared by no chance
    long = " ".join(WORDS[:20])
    (recipe.parent / "general.txt").write_text(f"{long} " * 9)
    with (recipe.parent / "rows.csv").open("a") as file:
        file.write(f"{long},good\n")
    assert any(note.startswith("1 of ") and "probe.text" in note for note in job(recipe).notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["probe.text=nothing.txt"], "names no text file"),
        (["probe.length=40", "probe.text=short.txt"], r"probe.text has \d+ tokens, which make no block of 40"),
    ],
)
def test_a_probe_without_text_is_refused(recipe: Path, changes: list[str], said: str) -> None:
    (recipe.parent / "short.txt").write_text("a b c")
    with pytest.raises(UserError, match=said):
        run(job(recipe, *changes), quiet=True)


def test_a_probe_is_for_generation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model of task=classification has no words for"):
        load_recipe(save_recipe(tmp_path, "probe: {text: a.txt}\n"))
