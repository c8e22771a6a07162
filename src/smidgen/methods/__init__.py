"""The techniques, one a file. To add one: its file, its line in `METHODS`, its test."""

from __future__ import annotations

from smidgen.delta import Method
from smidgen.methods.full import FullFineTuning
from smidgen.methods.head import HeadOnly
from smidgen.methods.houlsby import Houlsby
from smidgen.methods.lora import LoRA
from smidgen.methods.p_tuning import PTuning
from smidgen.methods.parallel import Parallel
from smidgen.methods.pfeiffer import Pfeiffer
from smidgen.methods.prefix_tuning import PrefixTuning
from smidgen.methods.prompt_tuning import PromptTuning

__all__ = [
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
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FullFineTuning,
        HeadOnly,
        LoRA,
        Houlsby,
        Pfeiffer,
        Parallel,
        PrefixTuning,
        PromptTuning,
        PTuning,
    )
}
