"""The techniques, one a file. To add one: its file, its line in `METHODS`, its test."""

from __future__ import annotations

from smidgen.delta import Method
from smidgen.methods.adalora import AdaLoRA
from smidgen.methods.adapter_drop import AdapterDrop
from smidgen.methods.adapter_fusion import AdapterFusion
from smidgen.methods.bitfit import BitFit
from smidgen.methods.compacter import Compacter
from smidgen.methods.dora import DoRA
from smidgen.methods.full import FullFineTuning
from smidgen.methods.hard_prompt import HardPrompt
from smidgen.methods.head import HeadOnly
from smidgen.methods.houlsby import Houlsby
from smidgen.methods.hra import HRA
from smidgen.methods.ia3 import IA3
from smidgen.methods.invertible import Invertible
from smidgen.methods.llama_adapter import LlamaAdapter
from smidgen.methods.loha import LoHa
from smidgen.methods.lokr import LoKr
from smidgen.methods.lora import LoRA
from smidgen.methods.lora_fa import LoRAFA
from smidgen.methods.lora_plus import LoRAPlus
from smidgen.methods.loreft import LoReFT
from smidgen.methods.mam import MAM
from smidgen.methods.miss import MiSS
from smidgen.methods.norm_tuning import NormTuning
from smidgen.methods.oft import OFT
from smidgen.methods.p_tuning import PTuning
from smidgen.methods.p_tuning_v2 import PTuningV2
from smidgen.methods.parallel import Parallel
from smidgen.methods.pfeiffer import Pfeiffer
from smidgen.methods.pissa import PiSSA
from smidgen.methods.prefix_tuning import PrefixTuning
from smidgen.methods.progressive import Progressive
from smidgen.methods.prompt_tuning import PromptTuning
from smidgen.methods.representation_mixing import RepresentationMixing
from smidgen.methods.rslora import RsLoRA
from smidgen.methods.unipelt import UniPELT
from smidgen.methods.vera import VeRA

__all__ = [
    "HRA",
    "IA3",
    "MAM",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterDrop",
    "AdapterFusion",
    "BitFit",
    "Compacter",
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
    "VeRA",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FullFineTuning,
        HeadOnly,
        LoRA,
        RsLoRA,
        LoRAPlus,
        LoRAFA,
        DoRA,
        PiSSA,
        AdaLoRA,
        VeRA,
        LoHa,
        LoKr,
        MiSS,
        Houlsby,
        Pfeiffer,
        Parallel,
        Compacter,
        AdapterDrop,
        Invertible,
        AdapterFusion,
        RepresentationMixing,
        IA3,
        BitFit,
        NormTuning,
        OFT,
        HRA,
        LoReFT,
        PrefixTuning,
        PTuningV2,
        LlamaAdapter,
        PromptTuning,
        PTuning,
        HardPrompt,
        MAM,
        UniPELT,
        Progressive,
    )
}
