"""Combined adapters compute what the combination says, on the weights' changes and not on their factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import (
    METHODS,
    OFT,
    AdaLoRA,
    Adapter,
    Houlsby,
    LoRA,
    Method,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    RsLoRA,
    attach,
    combine,
    load,
    save_peft,
)
from smidgen.combining import largest, merged
from smidgen.layers import weight_matrix
from smidgen.updates import changes
from tests.conftest import build, example, make_batch
from tests.methods.test_contract import disturb, logits


def members(methods: Mapping[str, Method], architecture: str = "llama") -> tuple[PreTrainedModel, dict[str, Adapter]]:
    """A tiny model with adapters of these names, each moved to a place of its own."""
    model, found = build(architecture), {}
    for seed, (name, method) in enumerate(methods.items()):
        found[name] = attach(model, method, name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in found[name].parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, found


@pytest.mark.parametrize("how", ["sum", "mean", "ties", "dare"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("full", "progressive")])
def test_one_adapter_with_weight_one_is_that_adapter(name: str, how: str) -> None:
    model, found = members({"mine": example(name, "bert")}, "bert")
    batch = make_batch("bert")
    expected = logits(model, batch)
    made = combine(model, {"mine": 1.0}, name="mix", how=how)  # type: ignore[arg-type]
    assert made.active
    assert torch.equal(logits(model, batch), expected)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    found["mine"].activate()
    assert torch.equal(logits(model, batch), expected)


def test_a_sum_is_of_the_weights_changes_whatever_their_scale_and_rank() -> None:
    """peft sums factors, which is neither the sum of the updates nor, for one rsLoRA, the member itself."""
    model, found = members({"a": LoRA(rank=2, alpha=3.0), "b": RsLoRA(rank=4, alpha=5.0), "c": PiSSA(rank=2)})
    updates = {name: changes(adapter) for name, adapter in found.items()}
    made = combine(model, {"a": 0.7, "b": -0.2, "c": 1.5}, name="mix")
    assert [method.name for method in made.methods] == ["lora"]
    assert made.methods[0].rank == 2 + 4 + 2 * 2
    for name, change in changes(made).items():
        expected = 0.7 * updates["a"][name] - 0.2 * updates["b"][name] + 1.5 * updates["c"][name]
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def test_a_sum_of_adapters_on_different_layers_is_all_of_them(tmp_path: Path) -> None:
    model, found = members({"a": LoRA(rank=2, targets="attention"), "b": LoRA(rank=3, targets="feed-forward")})
    batch = make_batch("llama")
    together = build("llama")
    both = attach(together, [LoRA(rank=2, targets="attention"), LoRA(rank=3, targets="feed-forward")])
    with torch.no_grad():
        for number, name in enumerate(("a", "b")):
            for delta, theirs in zip(both.deltas[number], found[name].deltas[0], strict=True):
                delta.load_state_dict(theirs.state_dict())
    made = combine(model, {"a": 1.0, "b": 1.0}, name="mix")
    torch.testing.assert_close(logits(model, batch), logits(together, batch), atol=1e-5, rtol=1e-4)
    made.save(tmp_path / "mix")
    again = build("llama")
    load(again, tmp_path / "mix")
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_heads_are_summed_as_differences_from_the_base_model() -> None:
    model, found = members({"a": LoRA(rank=2), "b": LoRA(rank=2)}, "bert")
    base = found["a"].base_parameters()["classifier.weight"]
    heads = {name: dict(adapter.named_parameters())["classifier.weight"] for name, adapter in found.items()}
    made = combine(model, {"a": 0.5, "b": 2.0}, name="mix")
    expected = base + 0.5 * (heads["a"] - base) + 2.0 * (heads["b"] - base)
    torch.testing.assert_close(dict(made.named_parameters())["classifier.weight"], expected)


@pytest.mark.parametrize("method", [Houlsby(), PrefixTuning(length=3), PromptTuning(length=3)])
def test_a_mean_is_of_the_parameters(method: Method) -> None:
    model, found = members({"a": method, "b": method}, "bert")
    made = combine(model, {"a": 3.0, "b": 1.0}, name="mix", how="mean")
    a, b = (dict(found[name].named_parameters()) for name in ("a", "b"))
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * a[name] + 0.25 * b[name])


def test_ties_trims_elects_signs_and_averages_what_agrees() -> None:
    first = torch.tensor([[4.0, -3.0, 0.1, 2.0]])
    second = torch.tensor([[2.0, 5.0, -0.2, 0.3]])
    generator = torch.Generator()
    kept = [largest({"w": update}, 0.5)["w"] for update in (first, second)]
    found = merged(kept, [0.5, 0.5], "ties", 0.5, generator)
    # kept: 4, -3 and 2, 5; the signs elected by 0.5 * (4 + 2) and 0.5 * (-3 + 5)
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 0.0, 0.0]]))
    found = merged([torch.tensor([[10.0, 1.0]]), torch.tensor([[1.0, -3.0]])], [0.5, -1.0], "ties", 1.0, generator)
    torch.testing.assert_close(found, torch.tensor([[10.0, 3.5 / 1.5]]))  # 5 against -1; 0.5 and 3 agree
    found = merged([torch.tensor([[4.0, 1.0]]), torch.tensor([[2.0, 3.0]])], [1.0, 1.0], "ties", 1.0, generator)
    torch.testing.assert_close(found, torch.tensor([[3.0, 2.0]]))


def test_ties_trims_an_adapter_s_matrices_together() -> None:
    """The paper's trim is of the whole task vector: where changes are small, less of them is kept."""
    updates = {"large": torch.arange(1.0, 9.0).view(2, 4), "small": torch.full((2, 4), 0.5)}
    kept = largest(updates, 0.25)
    assert kept["large"].flatten().tolist() == [0.0] * 4 + [5.0, 6.0, 7.0, 8.0]
    assert not kept["small"].any()
    assert int((largest({"a": torch.ones(10), "b": -torch.ones(10)}, 0.2)["a"] != 0).sum()) <= 4
    assert largest({}, 0.2) == {}


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_what_a_rank_has_no_room_for_is_said(how: str) -> None:
    model, found = members({"a": LoRA(rank=2), "b": LoRA(rank=2)})
    whole = combine(model, {"a": 1.0, "b": 1.0}, name="whole", how=how, rank=64)  # type: ignore[arg-type]
    part = combine(model, {"a": 1.0, "b": 1.0}, name="part", how=how, rank=2)  # type: ignore[arg-type]
    all_of, kept = changes(whole), changes(part)
    lost = sum(float((all_of[name] - kept[name]).square().sum()) for name in kept)
    share = (lost / sum(float(update.square().sum()) for update in all_of.values())) ** 0.5
    assert whole.lost == pytest.approx(0.0, abs=1e-6)
    assert part.lost == pytest.approx(share, rel=1e-3)
    assert part.lost > 0.1
    assert found["a"].lost == 0.0


def test_dare_keeps_the_mean_of_what_it_drops() -> None:
    update = torch.full((200, 200), 0.3)
    found = merged([update], [1.0], "dare", 0.25, torch.Generator().manual_seed(0))
    assert found.unique().tolist() == [0.0, pytest.approx(1.2)]
    assert abs(float(found.mean()) - 0.3) < 0.02


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_other_changes_of_weights_become_the_nearest_lora(how: str) -> None:
    model, found = members({"a": LoRA(rank=2), "b": OFT(block_size=8)})
    updates = {name: changes(adapter) for name, adapter in found.items()}
    with pytest.raises(ValueError, match="Say which rank its LoRA shall have"):
        combine(model, {"a": 1.0, "b": 1.0}, name="mix", how=how)  # type: ignore[arg-type]
    density = None if how == "sum" else 1.0
    made = combine(model, {"a": 1.0, "b": 1.0}, name="mix", how=how, rank=16, density=density)  # type: ignore[arg-type]
    if how != "ties":
        for place in made.places[0]:
            layer = weight_matrix(place.layer)
            expected = updates["a"][place.name] + updates["b"][place.name]
            if min(layer.shape) <= 16:
                torch.testing.assert_close(changes(made)[place.name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
@pytest.mark.parametrize("order", [("own", "lora"), ("lora", "own")])
def test_one_that_trains_the_model_s_own_alone_leaves_the_others_in(order: tuple[str, str], how: str) -> None:
    methods = {"own": METHODS["head"](), "lora": LoRA(rank=2)}
    model, found = members({name: methods[name] for name in order}, "bert")
    rank = None if how == "sum" else 2
    combined = combine(model, dict.fromkeys(order, 0.5), name="both", how=how, rank=rank)  # type: ignore[arg-type]
    assert [method.name for method in combined.methods] == ["lora"]
    assert len(combined.places[0]) == len(found["lora"].places[0])


def test_what_cannot_be_combined_is_refused() -> None:
    model, _ = members({"a": LoRA(rank=2), "b": PrefixTuning(length=2), "c": PrefixTuning(length=3)})
    for weights, how, message in (
        ({}, "sum", "it got none"),
        (["a", "b"], "sum", r"takes names with their weights, .*; got \['a', 'b'\]"),
        ({"d": 1.0}, "sum", "no adapter 'd'. It has: a, b, c"),
        ({"a": 1.0, "b": 1.0}, "sum", "Say which rank"),
        ({"b": 1.0, "c": 1.0}, "mean", "of the same techniques and sizes"),
        ({"a": 0.5}, "mean", None),
        ({"a": 1.0, "b": 1.0}, "mean", "product of mean factors"),
        ({"b": 1.0, "c": -1.0}, "mean", "sum to 0"),
        ({"a": 1.0}, "median", "how must be one of sum, mean, ties, dare"),
    ):
        if message is None:
            combine(model, weights, name="half", how=how)  # type: ignore[arg-type]
            continue
        with pytest.raises(ValueError, match=message):
            combine(model, weights, name="mix", how=how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than a change of weights"):
        combine(model, {"a": 1.0, "b": 1.0}, name="mix", rank=4)
    with pytest.raises(ValueError, match="density must be above 0"):
        combine(model, {"a": 1.0}, name="mix", how="ties", density=0.0)
    with pytest.raises(ValueError, match=r"density=0.5 is what ties and dare keep; how='sum' keeps everything"):
        combine(model, {"a": 1.0}, name="mix", density=0.5)
    for rank in (0, 4.0, True):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
            combine(model, {"a": 1.0}, name="mix", rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has an adapter 'b' already"):
        combine(model, {"a": 1.0}, name="b")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1"])
def test_a_weight_that_is_no_finite_number_is_refused(weight: object) -> None:
    model = build("bert")
    for name in ("a", "b"):
        attach(model, LoRA(rank=2), name=name)
    with pytest.raises(ValueError, match="The weight of 'a' must be a finite number"):
        combine(model, {"a": weight, "b": 1.0}, name="c")  # type: ignore[dict-item]


def test_an_adalora_that_left_a_layer_out_is_combined_and_goes_to_peft(tmp_path: Path) -> None:
    model, batch = build("bert"), make_batch("bert")
    adapter = attach(model, AdaLoRA(rank=2, start_rank=3), name="a")
    disturb(adapter)
    delta = adapter.deltas[0][0]
    with torch.no_grad():
        delta.e.zero_()
        delta.mask.zero_()
    adapter.save(tmp_path / "a")
    again = build("bert")
    loaded = load(again, tmp_path / "a")
    expected = logits(again, batch)
    save_peft(loaded, tmp_path / "peft")
    combine(again, {"a": 1.0}, name="c")
    torch.testing.assert_close(logits(again, batch), expected)
    attach(again, LoRA(rank=2), name="b")
    combine(again, {"a": 1.0, "b": 0.0}, name="d")
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-5, rtol=1e-5)
