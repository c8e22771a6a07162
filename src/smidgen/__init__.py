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
    from smidgen.combining import combine
    from smidgen.delta import Delta, Method
    from smidgen.errors import UserError
    from smidgen.explaining import explain
    from smidgen.formats.to_peft import save_peft
    from smidgen.methods import (
        HRA,
        IA3,
        METHODS,
        OFT,
        BitFit,
        DoRA,
        FullFineTuning,
        HeadOnly,
        Houlsby,
        LoHa,
        LoKr,
        LoRA,
        LoRAFA,
        LoRAPlus,
        LoReFT,
        MiSS,
        NormTuning,
        Parallel,
        Pfeiffer,
        PiSSA,
        PrefixTuning,
        PromptTuning,
        PTuning,
        RepresentationMixing,
        RsLoRA,
        VeRA,
    )
    from smidgen.rates import parameter_groups
    from smidgen.routing import rows
    from smidgen.stacking import stack

__version__ = "0.1.0"

_HOME = {
    "Adapter": "smidgen.adapter",
    "Delta": "smidgen.delta",
    "Method": "smidgen.delta",
    "UserError": "smidgen.errors",
    "attach": "smidgen.attaching",
    "combine": "smidgen.combining",
    "explain": "smidgen.explaining",
    "load": "smidgen.attaching",
    "parameter_groups": "smidgen.rates",
    "rows": "smidgen.routing",
    "save_peft": "smidgen.formats.to_peft",
    "stack": "smidgen.stacking",
}
"""Where a public name is defined, if it is no technique."""

__all__ = [
    "HRA",
    "IA3",
    "MAM",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "AdapterDrop",
    "AdapterFusion",
    "BitFit",
    "Compacter",
    "Delta",
    "DoRA",
    "FullFineTuning",
    "HardPrompt",
    "HeadOnly",
    "Houlsby",
    "Invertible",
    "LlamaAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAPlus",
    "LoReFT",
    "Method",
    "MiSS",
    "NormTuning",
    "PTuning",
    "PTuningV2",
    "Parallel",
    "Pfeiffer",
    "PiSSA",
    "PrefixTuning",
    "Progressive",
    "PromptTuning",
    "RepresentationMixing",
    "RsLoRA",
    "UniPELT",
    "UserError",
    "VeRA",
    "attach",
    "combine",
    "explain",
    "load",
    "parameter_groups",
    "rows",
    "save_peft",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'smidgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "smidgen.methods")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
