"""Each technique computes its paper's formula, written down a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from smidgen import (
    MAM,
    AdapterFusion,
    Compacter,
    Delta,
    Houlsby,
    LoRA,
    LoReFT,
    Method,
    Parallel,
    Pfeiffer,
    PrefixTuning,
    PTuning,
    RepresentationMixing,
    UniPELT,
    VeRA,
    attach,
)
from smidgen.methods.loreft import orthonormal
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb


def watched(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into and comes out of each layer, in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0] if inputs else None, output)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(**make_batch("bert"))
    for handle in handles:
        handle.remove()
    return seen


def one_delta(method: Method) -> tuple[PreTrainedModel, Delta]:
    model = build("bert")
    adapter = attach(model, method)
    disturb(adapter)
    return model, adapter.deltas[0][0]


def at_the_end(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """What comes to the end of the second block, and what leaves it."""
    block = model.bert.encoder.layer[1]
    seen = watched(model, {"norm": block.output.LayerNorm, "block": block})
    return seen["norm"][1], seen["block"][1]


def bottleneck(delta: Delta, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(x @ delta.down.weight.T + delta.down.bias) @ delta.up.weight.T + delta.up.bias


def test_lora_adds_a_scaled_low_rank_product() -> None:
    model, delta = one_delta(LoRA(rank=3, alpha=7.0, targets="intermediate.dense", layers="0"))
    layer = model.bert.encoder.layer[0].intermediate.dense
    x, y = watched(model, {"layer": layer})["layer"]
    with torch.no_grad():
        expected = x @ (layer.weight + 7 / 3 * delta.b @ delta.a).T + layer.bias
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_houlsby_adds_a_bottleneck_of_the_sublayer_s_own_output() -> None:
    model, delta = one_delta(Houlsby(size=5, targets="feed-forward-sublayer", layers="1", norms=False))
    block = model.bert.encoder.layer[1]
    x, y = watched(model, {"dense": block.output.dense})["dense"]
    with torch.no_grad():
        h = x @ block.output.dense.weight.T + block.output.dense.bias
        torch.testing.assert_close(y, h + bottleneck(delta, h, functional.gelu), atol=1e-5, rtol=1e-5)


def test_pfeiffer_adds_a_bottleneck_of_the_block_s_output() -> None:
    model, delta = one_delta(Pfeiffer(reduction=8, layers="1"))
    h, y = at_the_end(model)
    with torch.no_grad():
        torch.testing.assert_close(y, h + bottleneck(delta, h, torch.relu), atol=1e-5, rtol=1e-5)
    assert delta.down.weight.shape == (32 // 8, 32)


def test_parallel_adds_a_bottleneck_of_the_sublayer_s_input() -> None:
    model, delta = one_delta(Parallel(size=5, scale=4.0, layers="1"))
    block = model.bert.encoder.layer[1]
    seen = watched(model, {"in": block.intermediate.dense, "out": block.output.dense})
    x, inner = seen["in"][0], seen["out"][0]
    with torch.no_grad():
        h = inner @ block.output.dense.weight.T + block.output.dense.bias
        torch.testing.assert_close(seen["out"][1], h + 4 * bottleneck(delta, x, torch.relu), atol=1e-5, rtol=1e-5)


def test_compacter_s_matrices_are_sums_of_kronecker_products() -> None:
    model, delta = one_delta(Compacter(reduction=4, n=4, targets="feed-forward-sublayer", layers="1", norms=False))
    dense = model.bert.encoder.layer[1].output.dense
    x, y = watched(model, {"dense": dense})["dense"]

    def times(part: torch.nn.Module, h: Tensor) -> Tensor:
        products = (torch.kron(a, torch.outer(s, t)) for a, s, t in zip(delta.rules.a, part.s, part.t, strict=True))
        return h @ sum(products).T + part.bias

    with torch.no_grad():
        h = x @ dense.weight.T + dense.bias
        expected = h + times(delta.up, functional.gelu(times(delta.down, h)))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_loreft_edits_what_a_subspace_shows() -> None:
    model, delta = one_delta(LoReFT(rank=3, layers="1"))
    h, y = at_the_end(model)
    with torch.no_grad():
        r = orthonormal(delta.subspace)
        torch.testing.assert_close(r @ r.T, torch.eye(3), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(r.T @ r @ delta.subspace.T, delta.subspace.T, atol=1e-4, rtol=1e-4)
        expected = h + (h @ delta.weight.T + delta.bias - h @ r.T) @ r
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_representation_mixing_takes_a_gate_s_share_of_the_mixture() -> None:
    model, delta = one_delta(RepresentationMixing(layers="1"))
    with torch.no_grad():
        delta.gate_logit.fill_(1.5)
    (h, y), gate = at_the_end(model), torch.sigmoid(torch.tensor(1.5))
    with torch.no_grad():
        expected = (1 - gate) * h + gate * h @ delta.mixer.T
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_what_starts_at_random_starts_as_small_as_it_says() -> None:
    up = attach(build("bert"), Houlsby(size=16)).deltas[0][0].up.weight.detach()
    assert 0.007 < float(up.std()) < 0.0095  # a deviation of 1e-2, cut at two of them
    assert float(up.abs().max()) <= 0.02
    assert attach(build("bert"), VeRA(rank=4, d_initial=0.5)).deltas[0][0].d.tolist() == [0.5] * 4


@pytest.mark.parametrize("hidden_size", [None, 12])
def test_prefix_tuning_attends_to_learned_keys_and_values(hidden_size: int | None) -> None:
    model, delta = one_delta(PrefixTuning(length=3, hidden_size=hidden_size, start="random"))
    attention, dense = model.bert.encoder.layer[0].attention.self, model.bert.encoder.layer[0].attention.output.dense
    layers = {"query": attention.query, "key": attention.key, "value": attention.value, "all": dense}
    seen = watched(model, layers)
    mask = make_batch("bert")["attention_mask"].bool()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    with torch.no_grad():
        keys, values = delta.keys_values() if hidden_size else delta.keys_values
        batch = len(mask)
        keys, values = (part.transpose(0, 1)[None].expand(batch, -1, -1, -1) for part in (keys, values))
        scores = heads(seen["query"][1]) @ torch.cat([keys, heads(seen["key"][1])], 2).transpose(2, 3) / 8**0.5
        allowed = torch.cat([torch.ones(batch, 3, dtype=torch.bool), mask], 1)[:, None, None]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        expected = (weights @ torch.cat([values, heads(seen["value"][1])], 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["all"][0], expected, atol=1e-5, rtol=1e-5)


def test_mam_is_a_prefix_and_a_parallel_adapter() -> None:
    """Section 4.6; the same as the list of the two, with the same numbers."""
    batch = make_batch("bert")
    one, two = build("bert"), build("bert")
    mam = attach(one, MAM(length=3, size=8))
    both = attach(two, [PrefixTuning(length=3), Parallel(size=8)])
    disturb(mam)
    numbers = {name.replace("mam", "*"): value for name, value in mam.state().items()}
    both.load_state({n: numbers[n.replace("prefix-tuning", "*").replace("parallel", "*")] for n in both.state()})
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, two(**batch).logits)
    assert mam.virtual_tokens == 3


def test_fusion_attends_to_what_each_adapter_adds() -> None:
    """Section 3.2, a token and an adapter at a time."""
    model = build("bert")
    members = [attach(model, Pfeiffer(), name=name) for name in "abc"]
    for member in members:
        disturb(member)
    fusion = attach(model, AdapterFusion(adapters="a, b, c"), name="fusion")
    disturb(fusion)
    block, delta = model.bert.encoder.layer[1], fusion.deltas[0][1]
    seen = watched(model, {"norm": block.output.LayerNorm, "block": block})
    h = seen["norm"][1]
    with torch.no_grad():
        z = [bottleneck(member.deltas[0][1], h, torch.relu) for member in members]
        query = h @ delta.query.T
        scores = torch.stack([(query * (adds @ delta.key.T)).sum(-1) for adds in z], -1).softmax(-1)
        expected = h + sum(scores[..., n, None] * (adds @ delta.value.T) for n, adds in enumerate(z))
    torch.testing.assert_close(seen["block"][1], expected, atol=1e-5, rtol=1e-5)
    assert not any(member.active for member in members)


def test_a_fusion_says_whose_it_is_by_names_that_tell_its_members_apart() -> None:
    def saved(adapters: str) -> str:
        return AdapterFusion(adapters=adapters).folded([]).adapters

    assert saved("runs/mood/adapter, runs/topic/adapter") == "mood/adapter, topic/adapter"
    assert saved("/somewhere/mood, /elsewhere/topic") == "mood, topic"
    assert saved("a, b") == "a, b"
    with pytest.raises(ValueError, match="hold one of them twice"):
        AdapterFusion(adapters="a, b, ./a")


def test_unipelt_multiplies_each_part_by_its_gate() -> None:
    """Section 3.2, with a gate a token."""
    model = build("bert")
    adapter = attach(model, UniPELT(rank=2, length=3, reduction=8, targets="query", layers="0"))
    disturb(adapter)
    lora, prefix, adapted = adapter.deltas[0]
    attention, block = model.bert.encoder.layer[0].attention.self, model.bert.encoder.layer[0]
    seen = watched(
        model, {"query": attention.query, "context": attention, "norm": block.output.LayerNorm, "block": block}
    )

    def gate(of: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ of.gate.weight.T + of.gate.bias)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    with torch.no_grad():
        x, query = seen["query"]
        change = 8.0 * x @ lora.inner.a.T @ lora.inner.b.T
        plain = x @ attention.query.weight.T + attention.query.bias
        torch.testing.assert_close(query, plain + gate(lora, x) * change, atol=1e-5, rtol=1e-5)
        keys, values = (part.transpose(0, 1) for part in prefix.keys_values)
        beside = (heads(query) @ keys.transpose(1, 2) / 8**0.5).softmax(-1) @ values
        mask = make_batch("bert")["attention_mask"].bool()[:, None, None]
        scores = heads(query) @ heads(attention.key(x)).transpose(2, 3) / 8**0.5
        own = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ heads(attention.value(x))
        expected = own.transpose(1, 2).flatten(2) + gate(prefix, query) * beside.transpose(1, 2).flatten(2)
        torch.testing.assert_close(seen["context"][1][0], expected, atol=1e-5, rtol=1e-5)
        h = seen["norm"][1]
        expected = h + gate(adapted, h) * bottleneck(adapted.inner, h, torch.relu)
        torch.testing.assert_close(seen["block"][1], expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_from_real_tokens_is_what_the_model_computes_for_them() -> None:
    """Section 7.4: the activations of real words; a text before which they stand is read as if they were typed."""
    model = build("llama")
    batch = make_batch("llama", rows=1)
    words = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = model(input_ids=torch.cat([words, batch["input_ids"]], 1)).logits[:, 3:]

    class Words:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            assert text == "three words"
            return {"input_ids": words[0].tolist()}

    attach(model, PrefixTuning(length=3, start="text", text="three words"), tokenizer=Words())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_starts_at_the_size_of_the_embedding(encoder: str) -> None:
    model = build("llama")
    delta = attach(model, PTuning(encoder=encoder)).deltas[0][0]
    size = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    torch.testing.assert_close(delta(model.get_input_embeddings()).pow(2).mean().sqrt(), size)
