"""oneDNN's fp32 products: as exact as PyTorch's own, allowed inside only, and never where they would be rounded."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smidgen import LoRA, attach
from smidgen.process import onednn
from tests.conftest import build, make_batch

CPU = torch.device("cpu")


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def allowed(monkeypatch):
    """What oneDNN is allowed, in order, on a machine where it is exact."""
    seen, allow = [], onednn._allowed
    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr(onednn, "_allowed", lambda precision: seen.append(precision) or allow(precision))
    return seen


def test_intels_own_cpus_are_left_to_intels_own_kernels(monkeypatch):
    monkeypatch.setattr(onednn, "is_exact", lambda: True)
    for maker, pays in (("vendor_id : GenuineIntel", False), ("vendor_id : AuthenticAMD", True), ("", True)):
        monkeypatch.setattr(onednn, "_maker", lambda maker=maker: maker)
        assert onednn.pays.__wrapped__() == pays
    monkeypatch.setattr(onednn, "is_exact", lambda: False)
    assert not onednn.pays.__wrapped__()


def test_loss_and_gradients_are_those_of_pytorchs_own_products(monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda: True)
    if not onednn.is_exact():
        pytest.skip("oneDNN has no exact fp32 products on this CPU, so that it is left alone")
    model = build("bert")
    adapter = attach(model, LoRA())
    torch.manual_seed(0)
    adapter.load_state({name: torch.randn_like(tensor) / 10 for name, tensor in adapter.state().items()})
    batch = make_batch(model)

    def gradients():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in adapter.parameters())]

    plain = gradients()
    with onednn.exact_onednn(CPU):
        assert setting() == "bf16"
        inside = gradients()
    torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-6)


def test_the_setting_is_as_it_was_afterwards_an_error_included(allowed):
    before = setting()
    with pytest.raises(KeyError), onednn.exact_onednn(CPU):
        raise KeyError
    assert setting() == before


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_model_that_is_not_on_the_cpu_is_left_alone(device, allowed):
    with onednn.exact_onednn(torch.device(device)):
        assert setting() == "none"


def test_a_cpu_that_rounds_is_found(monkeypatch):
    """Matrix units for bfloat16 do what this does: inputs are rounded, and their products added up in fp32."""

    def rounded(first, second):
        return torch.matmul(first.bfloat16().to(first.dtype), second.bfloat16().to(second.dtype))

    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (rounded if a.dtype == torch.float32 else product)(a, b)
    )
    monkeypatch.setattr(onednn, "is_exact", onednn.is_exact.__wrapped__)
    assert not onednn.is_exact()
    with onednn.exact_onednn(CPU):
        assert setting() == "none"


def test_fused_attention_is_kept_off_it_forward_and_backward(allowed):
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with onednn.exact_onednn(CPU):
        output = scaled_dot_product_attention(query, key, value)
        assert allowed == ["bf16", "none"]
        assert setting() == "bf16"
        output.sum().backward()
        assert allowed == ["bf16", "none", "none"]
        assert setting() == "bf16"
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value))


def test_inside_another_it_changes_nothing(allowed):
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with onednn.exact_onednn(CPU):
        with onednn.exact_onednn(CPU):
            output = scaled_dot_product_attention(query, key, value)
        output.sum().backward()
        assert allowed == ["bf16", "none", "none"]
        assert setting() == "bf16"
