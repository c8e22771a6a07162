"""Techniques that change while they train do so by themselves, in any loop, and say so when they cannot."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import (
    AdaLoRA,
    Adapter,
    AdapterDrop,
    HardPrompt,
    LoRA,
    LoRAPlus,
    Progressive,
    attach,
    load,
    parameter_groups,
)
from smidgen.delta import Service
from smidgen.layers import embedding_rows
from smidgen.methods.progressive import Depths
from smidgen.stepping import is_settled
from tests.conftest import build, make_batch


def train(model: PreTrainedModel, adapter: Adapter, steps: int, rate: float = 1e-2) -> list[float]:
    """A loop of somebody's own, who has heard of the clock and of no technique."""
    adapter.clock.steps = steps
    optimizer = torch.optim.AdamW(parameter_groups(adapter, rate))
    losses = []
    for step in range(steps):
        loss = model(**make_batch("bert", rows=8, seed=step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def ranks(adapter: Adapter) -> list[int]:
    return [int(delta.mask.sum()) for delta in adapter.deltas[0]]


def test_adalora_s_budget_falls_as_the_paper_s_equation() -> None:
    method = AdaLoRA(rank=4, start_rank=10, warmup=0.2, final=0.3)
    budgets = [method.budget(done, 5) for done in (0.0, 0.2, 0.45, 0.7, 1.0)]
    assert budgets == [50, 50, round(20 + 30 * 0.5**3), 20, 20]


def test_adalora_s_ranks_really_change_and_are_what_is_saved(tmp_path: Path) -> None:
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=3, start_rank=6, interval=1))
    assert ranks(adapter) == [6] * 18
    losses = train(model, adapter, 30)
    assert losses[-1] < losses[0]
    found = ranks(adapter)
    assert sum(found) == 3 * 18
    assert len(set(found)) > 1
    assert all(int((delta.e != 0).sum()) <= rank for delta, rank in zip(adapter.deltas[0], found, strict=True))
    adapter.save(tmp_path / "saved")
    batch = make_batch("bert")
    with torch.no_grad():
        expected = model(**batch).logits
        again = build("bert")
        loaded = load(again, tmp_path / "saved")
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=0)
    assert [delta.e.shape[0] for delta in loaded.deltas[0]] == found
    assert loaded.trainable < adapter.trainable


def test_adalora_keeps_the_triplets_whose_weights_matter() -> None:
    model = build("bert")
    adapter = attach(
        model, AdaLoRA(rank=1, start_rank=2, interval=1, warmup=0.0, final=0.5, targets="query", layers="0")
    )
    (delta,) = adapter.deltas[0]
    adapter.clock.steps = 2
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with torch.no_grad():
        delta.e.copy_(torch.tensor([0.01, 3.0]))
    model(**make_batch("bert")).loss.backward()
    optimizer.step()
    optimizer.step()
    assert delta.mask.tolist() == [0.0, 1.0]
    assert delta.e.tolist() == [0.0, 3.0]


def test_adalora_s_pull_is_the_gradient_of_the_authors_mean_of_norms_and_no_part_of_the_importances() -> None:
    torch.manual_seed(0)
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=3, orthogonality=0.7, beta=0.5))
    adapter.clock.steps = 10
    deltas = adapter.deltas[0]
    model(**make_batch("bert")).loss.backward()
    task = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    parts = [delta.p.T for delta in deltas] + [delta.q for delta in deltas]
    norms = [torch.linalg.matrix_norm(rows @ rows.T - torch.eye(3)) for rows in parts]
    (0.7 * torch.stack(norms).mean()).backward()
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    for name, parameter in adapter.named_parameters():
        parameter.grad = task[name].clone()
    sensitivity = (deltas[0].p * deltas[0].p.grad).abs() / 2
    torch.optim.SGD(adapter.parameters(), lr=0.0).step()
    torch.testing.assert_close([parameter.grad for parameter in adapter.parameters()], expected)
    torch.testing.assert_close(deltas[0].p_sensitivity, sensitivity)


def test_adalora_is_settled_when_its_budget_has_fallen() -> None:
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=3, interval=1, warmup=0.2, final=0.3))
    settled = []
    adapter.clock.steps = 10
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(10):
        model(**make_batch("bert")).loss.backward()
        optimizer.step()
        settled.append(is_settled(adapter))
        if is_settled(adapter):
            assert sum(ranks(adapter)) == 2 * 18
    assert settled == [False] * 6 + [True] * 4
    assert is_settled(attach(build("bert"), LoRA()))


def test_a_schedule_that_does_not_know_its_length_says_so_at_the_first_step() -> None:
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=3))
    optimizer = torch.optim.AdamW(adapter.parameters())
    model(**make_batch("bert")).loss.backward()
    with pytest.raises(RuntimeError, match=r"adapter\.clock\.steps = 1000"):
        optimizer.step()


def test_lora_plus_reaches_the_optimizer() -> None:
    adapter = attach(build("bert"), LoRAPlus(ratio=16.0))
    rates = {id(p): group["lr"] for group in parameter_groups(adapter, 1e-3) for p in group["params"]}
    for delta in adapter.deltas[0]:
        assert math.isclose(rates[id(delta.b)], 16 * rates[id(delta.a)])


def test_lora_plus_refuses_to_be_trained_as_plain_lora() -> None:
    model = build("bert")
    adapter = attach(model, LoRAPlus())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    model(**make_batch("bert")).loss.backward()
    with pytest.raises(RuntimeError, match=r"parameter_groups\(adapter, learning_rate\)"):
        optimizer.step()


def test_an_optimizer_of_other_parameters_is_not_heard() -> None:
    adapter = attach(build("bert"), LoRAPlus())
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()
    assert adapter.clock.step == 0


def test_adapter_drop_leaves_out_another_number_at_each_step_and_serves_with_drop() -> None:
    model = build("bert")
    adapter = attach(model, AdapterDrop(drop=2))
    assert len(adapter.deltas[0]) == 3
    left_out = adapter.deltas[0][0].left_out
    drawn = []
    for step in range(12):
        adapter.clock.step = step
        adapter.methods[0].schedule(adapter, adapter.deltas[0])
        drawn.append(left_out.training)
    assert drawn[0] == 0
    assert set(drawn) == {0, 1, 2}
    batch = make_batch("bert")
    with torch.no_grad():
        served = model.eval()(**batch).logits
        for delta in adapter.deltas[0][:2]:
            delta.service = Service(active=False)
        assert torch.equal(model(**batch).logits, served)


def test_adapter_drop_that_is_not_robust_has_no_bottleneck_where_it_is_left_out() -> None:
    adapter = attach(build("bert"), AdapterDrop(drop=2, robust=False))
    assert [place.name for place in adapter.places[0]] == ["bert.encoder.layer.2"]
    with pytest.raises(ValueError, match="drop=3 leaves none of the 3 bottlenecks"):
        attach(build("bert"), AdapterDrop(drop=3))


def trained_depths(adapter: Adapter) -> list[int]:
    depths = Depths(adapter.model)
    return sorted({depths.of(name) for name, p in adapter.named_parameters() if p.requires_grad})


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [("first", [[0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]), ("last", [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]])],
)
def test_progressive_widens_from_the_top_down_by_itself(embeddings: str, expected: list[list[int]]) -> None:
    model = build("bert")
    adapter = attach(model, Progressive(embeddings=embeddings, until=0.5))
    assert trained_depths(adapter) == expected[0]
    adapter.clock.steps = 8
    optimizer = torch.optim.SGD(parameter_groups(adapter, 0.01))
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    seen = []
    for _ in range(8):
        model(**make_batch("bert")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(trained_depths(adapter))
        if len(seen) == 1:
            lowest = {name for name in before if name.startswith("bert.encoder.layer.0.")}
            assert all(torch.equal(p, before[n]) for n, p in adapter.named_parameters() if n in lowest)
    assert seen == [expected[0]] + [expected[1]] * 2 + [expected[2]] * 5


def test_progressive_gives_lower_blocks_lower_rates() -> None:
    adapter = attach(build("bert"), Progressive(decay=2.6))
    rates = {id(p): group["lr"] for group in parameter_groups(adapter, 1.0) for p in group["params"]}
    named = {name: rates[id(parameter)] for name, parameter in adapter.named_parameters()}
    assert named["classifier.weight"] == 1.0
    for block in range(3):
        assert math.isclose(named[f"bert.encoder.layer.{block}.output.dense.weight"], 2.6 ** (block - 3))
    assert math.isclose(named["bert.embeddings.word_embeddings.weight"], 2.6**-4)


def test_progressive_schedules_what_other_techniques_train() -> None:
    adapter = attach(build("bert"), [LoRA(rank=2), Progressive(weights=False)])
    names = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[3] for name in names if name.startswith("bert.encoder")} == {"2"}
    assert "classifier.weight" in names
    assert not any(name.startswith("bert.encoder.layer.2.output.dense.weight") for name in names)


def test_progressive_saves_only_the_blocks_that_may_join(tmp_path: Path) -> None:
    adapter = attach(build("bert"), Progressive(layers="last:1", embeddings="never"))
    assert {Depths(adapter.model).of(name) for name in adapter.own_names} == {0, 1}


def test_a_hard_prompt_is_real_tokens_and_finds_those_that_fit(tmp_path: Path) -> None:
    """The loss pulls towards the rows of known tokens; the prompt must come out as exactly them."""
    model = build("llama")
    adapter = attach(model, HardPrompt(length=3))
    (delta,), embedding = adapter.deltas[0], model.get_input_embeddings()
    wanted = torch.tensor([7, 20, 41])
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(60):
        prompt = delta(embedding)
        assert torch.equal(prompt.detach(), embedding_rows(embedding)[delta.tokens(embedding)])
        (prompt - embedding.weight[wanted].detach()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert delta.tokens(embedding).tolist() == wanted.tolist()
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        typed = model(input_ids=torch.cat([wanted[None], ids], 1))
        adapter.save(tmp_path / "saved")
        with adapter.disabled():
            plain = model(input_ids=torch.cat([wanted[None], ids], 1)).logits[:, 3:]
        torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-5, rtol=1e-4)
    assert typed.logits.shape[1] == 6
    again = build("llama")
    loaded = load(again, tmp_path / "saved")
    assert loaded.deltas[0][0].tokens(again.get_input_embeddings()).tolist() == wanted.tolist()


def test_a_copy_of_a_model_goes_on_by_itself() -> None:
    model = build("bert")
    attach(model, AdaLoRA(rank=2, start_rank=4, interval=1))
    twin = copy.deepcopy(model)
    adapter = vars(twin)["_smidgen_adapters"]["default"]
    train(twin, adapter, 6)
    assert sum(ranks(adapter)) == 2 * 18


def test_a_step_that_a_scaler_skips_and_a_second_optimizer_are_not_counted() -> None:
    model = build("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=3))
    adapter.clock.steps = 10
    deltas = [p for n, p in adapter.named_parameters() if n not in adapter.head_names]
    head = [p for n, p in adapter.named_parameters() if n in adapter.head_names]
    first, second = torch.optim.SGD(deltas, lr=0.1, fused=True), torch.optim.SGD(head, lr=0.1)
    model(**make_batch("bert")).loss.backward()
    first.step()
    second.step()
    assert adapter.clock.step == 1
    first.found_inf = torch.ones(1)
    first.step()
    assert adapter.clock.step == 1


def test_adalora_does_not_see_a_scaler_s_factor_that_a_fused_optimizer_takes_off_itself() -> None:
    states = []
    for scale in (None, torch.tensor(1024.0)):
        model = build("bert")
        torch.manual_seed(0)
        adapter = attach(model, AdaLoRA(rank=2, start_rank=3, interval=1))
        adapter.clock.steps = 10
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            loss = model(**make_batch("bert")).loss
            (loss if scale is None else scale * loss).backward()
            if scale is not None:
                optimizer.grad_scale = scale
            optimizer.step()
            optimizer.zero_grad()
        states.append(adapter.state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_a_length_of_nothing_is_not_known() -> None:
    adapter = attach(build("bert"), LoRA(rank=2))
    adapter.clock.steps = 0
    with pytest.raises(RuntimeError, match="does not know its length"):
        adapter.clock.share("AdaLoRA")


def test_an_adapter_that_left_is_not_heard() -> None:
    model = build("bert")
    left = attach(model, Progressive(keep_base=True))
    left.detach()
    after = attach(model, LoRA(rank=2))
    model(**make_batch("bert")).loss.backward()
    torch.optim.SGD(list(model.parameters()), lr=0.1).step()
    assert left.clock.step == 0
    assert all(parameter.requires_grad for parameter in after.parameters())
