"""What a layer has to gain is its gradient's, and a budget is spent where a number buys the most of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from smidgen import LoRA
from smidgen.errors import UserError
from smidgen.process import identification
from smidgen.process.identification import (
    Sensitivity,
    allot,
    allot_time,
    allotted,
    identify,
    technique_of,
)
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.recipe import Recipe, load_recipe
from smidgen.process.technique import TechniqueSpec
from smidgen.report.sensitivity import as_picture, as_table
from tests.process.tiny import save_recipe


@pytest.fixture(params=["encoder", "decoder"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    training = "training: {epochs: 1, batch_size: 8, learning_rate: 0.01}\n"
    return load_recipe(save_recipe(tmp_path, training, decoder=request.param == "decoder"))


def layers(*squares: tuple[float, ...], size: int = 10) -> list[Sensitivity]:
    return [Sensitivity(f"m.{n}.query", f"m.{n}", "query", size, 0.1, own) for n, own in enumerate(squares)]


def test_shares_are_those_of_the_gradients_squares(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "HEAD_STEPS", 0)
    found = identify(recipe)
    assert sum(layer.share for layer in found) == pytest.approx(1)
    assert [layer.place for layer in found] == [f"{layer.block}.{layer.kind}" for layer in found]
    job = prepare(recipe.model_copy(update={"technique": TechniqueSpec.parse("full")}))
    job.model.eval()
    from smidgen.process.batches import WholeEpochs
    from smidgen.process.encoding import pad_id
    from smidgen.process.train import backward

    rows = job.splits["train"]
    order = WholeEpochs(rows, 8, recipe.training.seed)
    batches = [batch for epoch in range(4) for batch in order.batches(epoch)][: identification.BATCHES]
    assert len(order.batches(0)) < identification.BATCHES == len(batches)
    for batch in batches:
        backward(job.model, [rows[row] for row in batch], recipe.training, pad_id(job.tokenizer))
    gradients = {n: job.model.get_submodule(n).weight.grad / len(batches) for n in (layer.place for layer in found)}
    whole = sum(float(gradient.square().sum()) for gradient in gradients.values())
    for layer in found:
        assert layer.share == pytest.approx(float(gradients[layer.place].square().sum()) / whole, rel=1e-3)
        assert layer.size == sum(gradients[layer.place].shape)
        singular = torch.linalg.svdvals(gradients[layer.place])
        assert layer.squares == pytest.approx((singular**2).tolist()[:64], rel=1e-2, abs=1e-9)


def test_a_budget_goes_where_a_number_buys_the_most() -> None:
    found = layers((9.0, 8.0, 0.0, 0.0), (4.0, 0.1, 0.0, 0.0), (0.5, 0.4, 0.3, 0.2))
    assert list(allot(found, 10).values()) == [1, 0, 0]
    assert list(allot(found, 20).values()) == [1, 1, 0]  # a rank of 2 is more than twice what 20 buys everywhere
    assert list(allot(found, 39).values()) == [2, 1, 0]
    assert list(allot(found, 10_000).values()) == [4, 4, 4]
    with pytest.raises(UserError, match="A budget of 9 trained numbers buys nothing: a rank of 1 needs 10 at least"):
        allot(found, 9)


@given(st.lists(st.lists(st.floats(0, 10), min_size=8, max_size=8), min_size=1, max_size=6), st.integers(20, 2000))
def test_a_budget_is_kept_and_no_doubling_is_left_that_it_could_pay(squares: list[list[float]], budget: int) -> None:
    found = [
        Sensitivity(f"m.{n}.q", f"m.{n}", "q", random.Random(n).randrange(5, 20), 0.1, tuple(sorted(own, reverse=True)))
        for n, own in enumerate(squares)
    ]
    ranks = allot(found, budget)
    spent = sum(ranks[layer.place] * layer.size for layer in found)
    assert spent <= budget
    assert set(ranks.values()) <= {0, 1, 2, 4, 8}
    most = max(1, identification.SPREAD * budget / sum(layer.size for layer in found))
    assert max(ranks.values()) <= most
    for layer in found:
        rank = ranks[layer.place]
        if rank < 8 and max(1, 2 * rank) <= most:
            assert spent + max(rank, 1) * layer.size > budget


def test_a_time_buys_as_many_of_the_last_blocks_as_fit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found = identify(recipe)
    blocks = list(dict.fromkeys(layer.block for layer in found))

    number = {layer.place: blocks.index(layer.block) for layer in found}

    def planned(job: Job) -> SimpleNamespace:
        depth = min(number[place.name] for _, place, _ in job.adapter.entries())
        return SimpleNamespace(seconds=10.0 * (len(blocks) - depth))

    monkeypatch.setattr(Job, "plan", planned)
    trained = {place for place, rank in allot_time(found, recipe, 10.0).items() if rank}
    assert {layer.block for layer in found if layer.place in trained} == {blocks[-1]}
    trained = {place for place, rank in allot_time(found, recipe, 25.0).items() if rank}
    assert {layer.block for layer in found if layer.place in trained} == set(blocks)
    with pytest.raises(UserError, match="the last block alone takes about 10 s"):
        allot_time(found, recipe, 9.0)


def test_the_chosen_ranks_are_what_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    found = identify(recipe)
    ranks = allot(found, 700)
    chosen = recipe.model_copy(update={"technique": TechniqueSpec.parse(technique_of(found, ranks))})
    path = tmp_path / "chosen.yaml"
    path.write_text(chosen.written())
    job = prepare(load_recipe(path))
    built = {place.name: delta.a.shape[0] for _, place, delta in job.adapter.entries()}
    assert built == {place: rank for place, rank in ranks.items() if rank}
    assert all(delta.scale == LoRA().alpha / LoRA().rank for _, _, delta in job.adapter.entries())


def test_bytes_buy_a_fourth_as_many_numbers(recipe: Recipe) -> None:
    found = identify(recipe)
    assert allotted(found, recipe, "8kB") == allotted(found, recipe, "2k") == allot(found, 2000)
    with pytest.raises(UserError, match="A budget of 0 trained numbers buys nothing"):
        allotted(found, recipe, "3B")


def test_table_and_picture_hold_every_layer() -> None:
    found = [
        Sensitivity(f"m.{n}.{kind}", f"m.{n}", kind, 10, share, (1.0,))
        for n in range(2)
        for kind, share in (("attention.output", 0.4), ("output", 0.1))
    ]
    console = Console(width=60, record=True)
    console.print(as_table(found, {layer.place: 4 for layer in found}))
    text = console.export_text()
    assert text.index("\n1") < text.index("\n0")
    assert text.count("40.0 (4)") == 2
    picture = ElementTree.fromstring(as_picture(found, None, "here"))
    assert len([one for one in picture.iter() if one.get("class") == "cell"]) == 4
    assert json.dumps([one.text for one in picture.iter()]).count("10.0") == 2
