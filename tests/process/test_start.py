"""A run goes on from the adapter of another: what was learned stays, a head for other labels starts anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smidgen.errors import UserError
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from tests.process.tiny import save_recipe

TRAINING = "training: {epochs: 1, learning_rate: 0.01}\n"


@pytest.fixture(scope="module", params=["lora", "prefix-tuning", "full"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_recipe(tmp_path_factory.mktemp("start"), f"{TRAINING}technique: {request.param}\n")
    run(prepare(load_recipe(path)), quiet=True)
    return path


def test_training_goes_on_from_the_same_weights_and_head(trained: Path) -> None:
    from smidgen.process.opening import reopen

    before = reopen(trained.parent / "out")
    again = prepare(load_recipe(trained, ["start=out", "output=again"]))
    expected = before.adapter.state()
    assert again.adapter.state().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.adapter.state().items())
    assert all(parameter.requires_grad for parameter in again.adapter.parameters())
    metrics = run(again, quiet=True)
    assert metrics["trained"] == before.adapter.trainable


def test_a_head_for_other_labels_starts_anew(trained: Path) -> None:
    rows = (trained.parent / "rows.csv").read_text()
    (trained.parent / "other.csv").write_text(rows.replace(",yes", ",up").replace(",no", ",down"))
    new = prepare(load_recipe(trained, ["start=out", "data.train=other.csv"])).adapter
    fresh = prepare(load_recipe(trained, ["data.train=other.csv"])).adapter
    old = prepare(load_recipe(trained, ["start=out"])).adapter
    states = {name: adapter.state() for name, adapter in {"new": new, "fresh": fresh, "old": old}.items()}
    for name, tensor in states["new"].items():
        source = "fresh" if name in new.head_names else "old"
        assert torch.equal(tensor, states[source][name]), name
    assert any(name in new.head_names for name in states["new"])
    assert not all(name in new.head_names for name in states["new"])


def test_the_result_depends_on_what_the_start_holds_not_on_where_it_is(trained: Path) -> None:
    fingerprints = {load_recipe(trained, [f"start={start}"]).fingerprint() for start in ("out", "out/adapter")}
    assert len(fingerprints) == 1
    assert load_recipe(trained).fingerprint() not in fingerprints


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, TRAINING)
    with pytest.raises(UserError, match="holds no adapter"):
        prepare(load_recipe(path, ["start=nowhere"]))
    run(prepare(load_recipe(path)), quiet=True)
    with pytest.raises(UserError, match="holds lora, and the recipe trains houlsby"):
        prepare(load_recipe(path, ["start=out", "technique=houlsby"]))
    with pytest.raises(UserError, match=r"LoRA with rank=8, and technique gives rank=4: .* leave it out"):
        prepare(load_recipe(path, ["start=out", "technique={name: lora, rank: 4}"]))
