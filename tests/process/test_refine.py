"""Refinement: a change of the trained subset is kept only where it proves better, and the history says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smidgen.errors import UserError
from smidgen.process import refine as module
from smidgen.process.identification import Sensitivity, technique_of
from smidgen.process.opening import reopen
from smidgen.process.recipe import load_recipe
from smidgen.process.refine import CHANGES, refine
from smidgen.process.technique import TechniqueSpec
from tests.process.tiny import save_recipe

pytestmark = pytest.mark.usefixtures("runs_here")

RECIPE = """\
training: {epochs: 2, batch_size: 8, learning_rate: 0.01}
technique: {name: lora, rank: 2, targets: attention}
seeds: [0, 1]
refine: {rounds: 4}
"""


@pytest.fixture(scope="module")
def refined(runs_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = save_recipe(tmp_path_factory.mktemp("refine"), RECIPE)
    refine(load_recipe(path), command="")
    return path, json.loads((path.parent / "out" / "refine.json").read_text())["rows"]


def test_every_round_says_what_was_tried_and_why_it_was_kept_or_not(refined: tuple[Path, list[dict]]) -> None:
    path, history = refined
    assert history[0]["change"] == "the start"
    assert history[0]["entry"] == {"name": "lora", "rank": 2, "targets": "attention"}
    assert len(history) == 5
    for entry in history[1:]:
        assert entry["change"] in CHANGES
        assert entry["kept"] == (entry["interval"][0] > 0)
        spec = TechniqueSpec.parse(entry["entry"])
        runs = [
            json.loads((path.parent / f"out/refine/{spec.slug}-s{seed}/metrics.json").read_text()) for seed in (0, 1)
        ]
        assert entry["score"] == pytest.approx(np.mean([run["validation"]["accuracy"] for run in runs]))
        assert all(run["test"] is None for run in runs)


def test_the_test_split_is_scored_for_the_start_and_the_end_alone(refined: tuple[Path, list[dict]]) -> None:
    path, history = refined
    last = [entry for entry in history if entry["kept"]][-1]
    known = {TechniqueSpec.parse(entry["entry"]).slug for entry in (history[0], last)}
    scored = {
        file.parent.name.rpartition("-s")[0]
        for file in (path.parent / "out").glob("r*/*/metrics.json")
        if json.loads(file.read_text())["test"] is not None or (file.parent / "test.json").exists()
    }
    assert scored == known


def test_the_start_is_the_run_of_compare(refined: tuple[Path, list[dict]]) -> None:
    path, history = refined
    start = TechniqueSpec.parse(history[0]["entry"]).slug
    assert sorted(folder.name for folder in (path.parent / "out" / "runs").iterdir()) == [f"{start}-s0", f"{start}-s1"]
    assert not list((path.parent / "out" / "refine").glob(f"{start}-s*"))


def test_the_refined_recipe_has_what_was_kept(refined: tuple[Path, list[dict]]) -> None:
    path, history = refined
    recipe = load_recipe(path.parent / "out" / "refined.yaml")
    assert recipe.technique.written() == [entry for entry in history if entry["kept"]][-1]["entry"]


def test_what_proves_better_is_kept_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)
    monkeypatch.setattr(module, "beyond_chance", lambda *_, **__: (0.1, 0.2))
    history, _ = refine(load_recipe(path, ["refine.rounds=2"]), command="")
    assert [entry.change for entry in history[1:]] == ["twice the rank where most is to gain"] * 2
    assert history[0].trained < history[1].trained < history[2].trained
    ranks = [sum(r * n for r, n in ranks_of(tmp_path, entry.entry).items()) for entry in history]
    assert ranks[0] == 2 * 8
    assert ranks[1] == ranks[0] + 2 * 3  # of eight layers a third, which is three, has twice the rank
    assert ranks[1] < ranks[2]


@pytest.mark.parametrize(("interval", "kept"), [((-0.2, -0.1), True), ((0.1, 0.2), False)])
def test_of_a_loss_less_is_better_and_each_round_has_its_part_of_the_level(
    interval: tuple[float, float], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, levels = save_recipe(tmp_path, RECIPE, decoder=True), []
    monkeypatch.setattr(module, "beyond_chance", lambda *_, level: levels.append(level) or interval)
    history, _ = refine(load_recipe(path, ["refine.rounds=2", "training.epochs=1"]), command="")
    assert [entry.kept for entry in history] == [True, kept, kept]
    assert levels == [0.975, 0.975]


def ranks_of(folder: Path, entry: Any) -> dict[int, int]:
    """How many layers of a finished run have each rank."""
    (run,) = (folder / "out").glob(f"r*/{TechniqueSpec.parse(entry).slug}-s0")
    adapter = reopen(run).adapter
    counts: dict[int, int] = {}
    for method, places in zip(adapter.methods, adapter.places, strict=True):
        counts[method.rank] = counts.get(method.rank, 0) + len(places)
    return counts


def layer(name: str, share: float) -> Sensitivity:
    return Sensitivity(place=name, block="b.0", kind=name, size=10, share=share, squares=(share,))


LAYERS = [layer("a", 0.4), layer("b", 0.3), layer("c", 0.2), layer("d", 0.06), layer("e", 0.03), layer("f", 0.01)]


def test_what_would_end_it_after_the_start_is_seen_before(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    with pytest.raises(UserError, match="int8 leaves weights without a gradient"):
        refine(load_recipe(path, ["training.precision=int8"]), command="")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "refined.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"holds a refined\.yaml of your own"):
        refine(load_recipe(path), command="")
    assert not (tmp_path / "out" / "runs").exists()


def test_each_change_follows_what_the_layers_have_to_gain() -> None:
    raised, more, other, fewer = CHANGES.values()
    ranks = {"a": 4, "b": 4, "e": 4}
    assert raised(ranks, LAYERS) == {"a": 8, "b": 4, "e": 4}
    assert more(ranks, LAYERS) == {"a": 4, "b": 4, "e": 4, "c": 4}
    assert other(ranks, LAYERS) == {"c": 4, "d": 4, "f": 4}
    assert fewer(ranks, LAYERS) == {"a": 4, "b": 4}
    everywhere = dict.fromkeys("abcdef", 2)
    assert more(everywhere, LAYERS) is None
    assert other(everywhere, LAYERS) is None
    assert fewer({"a": 4}, LAYERS) is None


def test_a_technique_without_ranks_is_refused(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    with pytest.raises(UserError, match="refine changes ranks and layers, which Head only does not have"):
        refine(load_recipe(path, ["technique=head"]), command="")
    with pytest.raises(UserError, match="is a single one, and says nothing about chance"):
        refine(load_recipe(path, ["seeds=[0]"]), command="")
    assert not (tmp_path / "out").exists()


def test_what_the_entry_says_beside_ranks_and_layers_stays(tmp_path: Path) -> None:
    like = TechniqueSpec.parse(
        {
            "name": "rslora",
            "rank": 4,
            "alpha": 3.0,
            "layers": "last:1",
            "learning_rate": 0.02,
            "head_learning_rate": 0.03,
        }
    )
    first, second = technique_of(LAYERS, {"a": 4, "b": 8}, like=like)
    assert first == {
        **{"name": "rslora", "rank": 4, "alpha": 3.0, "learning_rate": 0.02, "head_learning_rate": 0.03},
        "targets": first["targets"],
    }
    assert (second["rank"], second["alpha"]) == (8, 3.0)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "loha", "lora-plus"])
def test_another_rank_keeps_the_scale_of_the_update(name: str) -> None:
    like = TechniqueSpec.parse([{"name": name, "rank": 2, "alpha": 8.0}, {"name": name, "rank": 4}])
    entries = technique_of(LAYERS, {"a": 4, "b": 8}, like=like, owners={"a": 0, "b": 1})
    for entry, part in zip(entries, like.parts, strict=True):
        before, after = part.method(), TechniqueSpec.parse(entry).methods()[0]
        root = name == "rslora"  # whose scale is made to fall with the rank's root
        assert after.alpha == (before.alpha if root else before.alpha * after.rank / before.rank)


def test_adalora_s_first_rank_grows_with_its_last() -> None:
    (entry,) = technique_of(LAYERS, {"a": 16}, like=TechniqueSpec.parse("adalora"))
    assert (entry["rank"], entry["start_rank"], entry["alpha"]) == (16, 24, 32.0)


def test_layers_that_cannot_be_changed_alone_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    outside = [{"name": "lora", "rank": 2, "targets": "dense"}]
    with pytest.raises(UserError, match=r"layers inside the blocks, and bert\.pooler\.dense is outside"):
        refine(load_recipe(path, [f"technique={json.dumps(outside)}"]), command="")
    with pytest.raises(UserError, match="here every run begins anew"):
        refine(load_recipe(path, ["start=elsewhere"]), command="")
    assert not (tmp_path / "out" / "runs").exists()
