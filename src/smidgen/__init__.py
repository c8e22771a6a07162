"""smidgen: fine-tune a smidgen of the weights.

Parameter-efficient fine-tuning of transformer models: `attach(model, LoRA(rank=8))` puts a technique on a model, any
training loop trains it, `save` and `load` carry it. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smidgen.adapter import Adapter
    from smidgen.attaching import attach, load
    from smidgen.delta import Delta, Method
    from smidgen.errors import UserError
    from smidgen.methods import (
        METHODS,
        FullFineTuning,
        HeadOnly,
        Houlsby,
        LoRA,
        Parallel,
        Pfeiffer,
        PrefixTuning,
        PromptTuning,
        PTuning,
    )

__version__ = "0.1.0"

_HOMES = {
    "smidgen.adapter": ["Adapter"],
    "smidgen.attaching": ["attach", "load"],
    "smidgen.delta": ["Delta", "Method"],
    "smidgen.errors": ["UserError"],
    "smidgen.methods": [
        "METHODS",
        "FullFineTuning",
        "HeadOnly",
        "Houlsby",
        "LoRA",
        "PTuning",
        "Parallel",
        "Pfeiffer",
        "PrefixTuning",
        "PromptTuning",
    ],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "Adapter",
    "Delta",
    "FullFineTuning",
    "HeadOnly",
    "Houlsby",
    "LoRA",
    "Method",
    "PTuning",
    "Parallel",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "UserError",
    "attach",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smidgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
