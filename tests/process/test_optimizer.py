"""The optimizer's groups: what has a rate of its own, and what decays."""

from __future__ import annotations

import pytest

from smidgen import Houlsby, attach
from smidgen.process.optimizer import make_optimizer, set_rates
from smidgen.process.recipe import TrainingConfig
from tests.conftest import build

CONFIG = TrainingConfig(weight_decay=0.1, warmup=0.0, schedule="constant")


def test_the_head_has_its_own_rate_and_vectors_do_not_decay() -> None:
    adapter = attach(build("bert"), Houlsby())
    optimizer = make_optimizer(adapter, CONFIG, (0.01, 0.5))
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
    optimizer = make_optimizer(attach(build("bert"), Houlsby()), CONFIG, (0.01, 0.5))
    assert set_rates(optimizer, 3, 10, CONFIG) == pytest.approx(0.01)
