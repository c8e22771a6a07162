"""The optimizer's groups: what has a rate of its own, and what decays."""

from __future__ import annotations

import pytest
import torch

from smidgen import BitFit, Houlsby, LoRA, attach, parameter_groups
from smidgen.process.optimizer import make_optimizer, set_rates
from smidgen.process.run_recipe import TrainingConfig
from tests.conftest import build, make_batch

CONFIG = TrainingConfig(weight_decay=0.1, warmup=0.0, schedule="constant")


def test_the_head_has_its_own_rate_and_vectors_do_not_decay() -> None:
    adapter = attach(build("bert"), Houlsby())
    optimizer = make_optimizer(adapter, CONFIG, ((0.01,), 0.5))
    set_rates(optimizer, 0, 10, CONFIG)
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == (0.5 if name in adapter.head_names else 0.01)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    assert sorted(seen) == sorted(names.values())


def test_the_rate_that_is_shown_is_the_adapter_s() -> None:
    optimizer = make_optimizer(attach(build("bert"), Houlsby()), CONFIG, ((0.01,), 0.5))
    assert set_rates(optimizer, 3, 10, CONFIG) == pytest.approx(0.01)


def test_a_step_is_adamw_s() -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        adapter = attach(build("bert"), LoRA(rank=2))
        groups = parameter_groups(adapter, 0.01, head_learning_rate=0.5, weight_decay=0.1)
        optimizer = make_optimizer(adapter, CONFIG, ((0.01,), 0.5)) if ours else torch.optim.AdamW(groups)
        for step in range(3):
            adapter.model(**make_batch("bert", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(adapter.state())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])


def test_each_technique_of_an_adapter_learns_at_its_own_rate() -> None:
    adapter = attach(build("bert"), [LoRA(rank=2), BitFit()])
    rates = {id(p): group["lr"] for group in parameter_groups(adapter, [0.1, 0.2]) for p in group["params"]}
    named = {name: rates[id(parameter)] for name, parameter in adapter.named_parameters()}
    assert {rate for name, rate in named.items() if ".lora." in name} == {0.1}
    biases = adapter.own_names - adapter.head_names
    assert {named[name] for name in biases} == {0.2}
    assert {named[name] for name in adapter.head_names} == {0.1}  # the first one's, whoever trains it as well
    with pytest.raises(ValueError, match="3 rates for 2 techniques"):
        parameter_groups(adapter, [0.1, 0.2, 0.3])
