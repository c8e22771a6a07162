"""Techniques that change a layer's weight compute their paper's formula, written down a second time from the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smidgen import (
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    Delta,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAPlus,
    Method,
    MiSS,
    PiSSA,
    RsLoRA,
    VeRA,
    attach,
)
from smidgen.layers import weight_matrix
from smidgen.methods.lokr import divided
from tests.conftest import build
from tests.methods.test_contract import disturb

QUERY = r"layer\.0\.attention\.self\.query"


def layer_with(method: Method, architecture: str = "bert") -> tuple[nn.Module, Delta]:
    """A layer of a tiny model, and the delta on it, moved away from its start."""
    adapter = attach(build(architecture), method)
    disturb(adapter)
    return adapter.places[0][0].layer, adapter.deltas[0][0]


def skew(upper: Tensor, size: int) -> Tensor:
    matrix = torch.zeros(size, size)
    matrix[tuple(torch.triu_indices(size, size, 1))] = upper
    return matrix - matrix.T


def low_rank(scale: float) -> Callable[[Tensor, Delta], Tensor]:
    return lambda weight, delta: weight + scale * delta.b @ delta.a


def dora(weight: Tensor, delta: Delta) -> Tensor:
    new = weight + 16 / 4 * delta.direction.b @ delta.direction.a
    return delta.magnitude[:, None] * new / new.norm(dim=1, keepdim=True)


def pissa(weight: Tensor, delta: Delta) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    residual = left[:, 4:] @ values[4:].diag() @ right[4:]
    return residual + delta.b @ delta.a


def vera(weight: Tensor, delta: Delta) -> Tensor:
    a, b = delta.shared.a[:, : weight.shape[1]], delta.shared.b[: weight.shape[0]]
    return weight + delta.b.diag() @ b @ delta.d.diag() @ a


def loha(weight: Tensor, delta: Delta) -> Tensor:
    return weight + 2 * (delta.b1 @ delta.a1) * (delta.b2 @ delta.a2)


def lokr(weight: Tensor, delta: Delta) -> Tensor:
    return weight + 4 * torch.kron(delta.c, delta.b @ delta.a)


def miss(weight: Tensor, delta: Delta) -> Tensor:
    """D maps the sum of the input's shards: each column of the update is the row of D for its place in a shard."""
    update = torch.stack([delta.d[column % 5] for column in range(weight.shape[1])], dim=1)
    return weight + update


def adalora(weight: Tensor, delta: Delta) -> Tensor:
    return weight + 16 / 8 * delta.p @ delta.e.diag() @ delta.q


def oft(weight: Tensor, delta: Delta) -> Tensor:
    blocks = [skew(row, 16) for row in delta.skew]
    identity = torch.eye(16)
    rotation = torch.block_diag(*[(identity - q) @ torch.linalg.inv(identity + q) for q in blocks])
    return weight @ rotation.T


def hra(weight: Tensor, delta: Delta) -> Tensor:
    for u in delta.u:
        weight = weight @ (torch.eye(len(u)) - 2 * torch.outer(u, u) / u.dot(u))
    return weight


FORMULAS: dict[str, tuple[Method, Callable[[Tensor, Delta], Tensor]]] = {
    "lora": (LoRA(rank=4, alpha=6.0, targets=QUERY), low_rank(6 / 4)),
    "rslora": (RsLoRA(rank=4, alpha=6.0, targets=QUERY), low_rank(6 / 2)),
    "lora-plus": (LoRAPlus(rank=4, alpha=6.0, targets=QUERY), low_rank(6 / 4)),
    "lora-fa": (LoRAFA(rank=4, alpha=6.0, targets=QUERY), low_rank(6 / 4)),
    "dora": (DoRA(rank=4, targets=QUERY), dora),
    "pissa": (PiSSA(rank=4, targets=QUERY), pissa),
    "vera": (VeRA(rank=6, targets=QUERY), vera),
    "loha": (LoHa(rank=4, targets=QUERY), loha),
    "lokr": (LoKr(rank=2, factor=4, targets=QUERY), lokr),
    "miss": (MiSS(rank=5, targets=QUERY), miss),
    "adalora": (AdaLoRA(targets=QUERY), adalora),
    "oft": (OFT(block_size=16, targets=QUERY), oft),
    "hra": (HRA(rank=6, targets=QUERY), hra),
    "ia3, output": (IA3(outputs=QUERY, inputs=None), lambda weight, delta: delta.scale[:, None] * weight),
    "ia3, input": (IA3(outputs=None, inputs=QUERY), lambda weight, delta: weight * delta.scale),
}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize(("method", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_a_layer_computes_with_the_weight_of_the_paper_s_formula(
    method: Method, formula: Callable[[Tensor, Delta], Tensor], architecture: str
) -> None:
    if architecture == "gpt2":  # whose Conv1D stores its weight the other way round, and which is not square
        fields = {"targets": r"h\.0\.attn\.c_attn"}
        if isinstance(method, IA3):
            fields = {"outputs" if method.outputs else "inputs": r"h\.0\.attn\.c_attn"}
        method = type(method)(**{**vars(method), **fields})
    layer, delta = layer_with(method, architecture)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        bias = layer.bias * (delta.scale if isinstance(method, IA3) and method.outputs else 1)
        expected = x @ formula(weight_matrix(layer).clone(), delta).T + bias
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("method", [LoRA, RsLoRA, LoRAPlus, DoRA, LoRAFA])
def test_counts_are_the_paper_s(method: type[Method], rank: int) -> None:
    _, delta = layer_with(method(rank=rank, targets=QUERY))
    trained = sum(parameter.numel() for parameter in delta.parameters())
    assert trained == {LoRAFA: 32 * rank, DoRA: 64 * rank + 32}.get(method, 64 * rank)


def test_rotations_keep_the_length_of_what_they_turn() -> None:
    for method in (OFT(block_size=16, targets=QUERY), HRA(targets=QUERY)):
        layer, delta = layer_with(method)
        x = torch.randn(5, 32)
        torch.testing.assert_close(delta(layer, (x,), x).norm(dim=1), x.norm(dim=1))


def test_lora_fa_keeps_none_of_a_layer_s_input_for_the_backward_pass() -> None:
    kept = {}
    for method in (LoRA(rank=4, targets=QUERY), LoRAFA(rank=4, targets=QUERY)):
        layer, _ = layer_with(method)
        sizes = []
        x = torch.randn(50, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            layer(x.tanh())
        kept[method.name] = sizes[1:]  # the first is tanh's own
    assert 50 * 32 in kept["lora"]
    assert 50 * 32 not in kept["lora-fa"]
    assert 50 * 4 in kept["lora-fa"]


def test_dora_s_norm_is_constant_in_the_backward_pass() -> None:
    """Section 4.3: the gradient of A is that of a fixed multiple of the update."""
    layer, delta = layer_with(DoRA(rank=4, targets=QUERY))
    x = torch.randn(3, 32)
    layer(x).sum().backward()
    ratio = delta.magnitude / (weight_matrix(layer) + delta.direction.update()).norm(dim=1)
    expected = 4 * (ratio.detach()[:, None] * delta.direction.b.detach()).sum(0)[:, None] * x.sum(0)
    torch.testing.assert_close(delta.direction.a.grad, expected, atol=1e-4, rtol=1e-4)


def test_dora_wants_to_be_first_on_a_layer_and_merges_a_row_of_zeros() -> None:
    with pytest.raises(ValueError, match="Put DoRA first"):
        attach(build("bert"), [LoRA(rank=2, targets=QUERY), DoRA(rank=2, targets=QUERY)])
    model = build("bert")
    layer = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.weight[0] = 0.0
    adapter = attach(model, [DoRA(rank=2, targets=QUERY), LoRA(rank=2, targets=QUERY)])
    with torch.no_grad():
        expected = layer(torch.ones(1, 32))
        adapter.merge()
        torch.testing.assert_close(layer(torch.ones(1, 32)), expected)


def test_vera_s_matrices_follow_from_the_seed() -> None:
    first, again, other = (layer_with(VeRA(rank=6, seed=seed, targets=QUERY))[1] for seed in (1, 1, 2))
    assert torch.equal(first.shared.a, again.shared.a)
    assert not torch.equal(first.shared.a, other.shared.a)
    with pytest.raises(ValueError, match="another version of torch"):
        attach(build("bert"), VeRA(rank=6, digest="0" * 64))


@pytest.mark.parametrize(
    ("side", "factor", "expected"),
    [(384, None, (16, 24)), (384, 8, (8, 48)), (127, None, (1, 127)), (100, 7, (5, 20)), (4, 4, (4, 1))],
)
def test_lokr_divides_a_side(side: int, factor: int | None, expected: tuple[int, int]) -> None:
    assert divided(side, factor) == expected


def test_updates_and_rotations_on_one_layer_merge_in_the_order_in_which_they_act() -> None:
    methods = [IA3(outputs=QUERY, inputs=None), OFT(block_size=16, targets=QUERY), LoRA(rank=4, targets=QUERY)]
    methods += [HRA(targets=QUERY), RsLoRA(rank=2, targets=QUERY)]
    adapter = attach(build("bert"), methods)
    disturb(adapter)
    layer, x = adapter.places[0][0].layer, torch.randn(4, 32)
    with torch.no_grad():
        expected = layer(x)
        adapter.merge()
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-4)
