"""What a folder of huggingface/peft's holds, as the readers of its techniques take it: each field and tensor once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from smidgen import targets
from smidgen.delta import Method, Side
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = TypeVar("Key")

_HARMLESS = frozenset(
    """
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode target_modules
    exclude_modules layers_to_transform layers_pattern modules_to_save fan_in_fan_out bias megatron_config
    megatron_core eva_config ensure_weight_tying runtime_config qalora_group_size save_projection projection_prng_key
    init_ia3_weights init_weights d_initial feedforward_modules num_layers num_attention_heads
    num_transformer_submodules token_dim prefix_projection encoder_hidden_size encoder_dropout encoder_num_layers
    encoder_reparameterization_type prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path
    rank_pattern use_effective_conv2d beta1 beta2 deltaT init_r target_r tinit tfinal total_step orth_reg_weight
    decompose_factor decompose_both eps num_virtual_tokens r adapter_layers module_dropout rank_dropout
    rank_dropout_scale
    """.split()
)
"""Fields that change nothing of a trained adapter, or whose effect is seen in the shapes of its tensors."""


class Source:
    """What a folder holds: the fields of its configuration, and its tensors, each of which is taken once."""

    def __init__(self, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model, self.config, self.tensors = model, config, tensors
        self._used = set(_HARMLESS)

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the configuration that is honoured."""
        self._used.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def take(self, ending: str) -> dict[str, Tensor]:
        """The tensors of all modules whose name ends so, by their modules' names."""
        found = {name: tensor for name, tensor in self.tensors.items() if name.endswith(f".{ending}")}
        for name in found:
            del self.tensors[name]
        return {module_of(name.removesuffix(f".{ending}")): tensor for name, tensor in found.items()}

    def need(self, ending: str) -> dict[str, Tensor]:
        """The same; a folder without any is not what it says that it is."""
        if not (found := self.take(ending)):
            raise ValueError(f"it has no tensor whose name ends in .{ending}")
        return found

    def place(self, name: str, side: Side = "output") -> Place:
        """The place at a module of this name."""
        return targets.exact(self.model, name, None, side)

    def check_used(self) -> None:
        """Raise a ValueError for a field that would change the adapter and was not looked at."""
        for name, value in self.config.items():
            if name not in self._used and value not in (None, False, {}, [], 0, 0.0):
                raise ValueError(f"its {name}={value!r} has no counterpart here")


@dataclasses.dataclass
class Part:
    """One technique read from a folder, with the state of its delta at each place."""

    method: Method
    states: list[tuple[Place, dict[str, Tensor]]]


def module_of(name: str) -> str:
    """The model's own name for what peft has wrapped."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def grouped(modules: Iterable[str], key: Callable[[str], Key]) -> dict[Key, list[str]]:
    """The modules that have the same key, in their order: a technique of ours has one rank and one scale."""
    groups: dict[Key, list[str]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def by_name(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """What a pattern that is a name, or the dotted end of one, says of a module; others are refused, not run."""
    for pattern, value in patterns.items():
        if not all(letter.isalnum() or letter in "._" for letter in pattern.replace("\\.", ".")):
            raise ValueError(f"its pattern {pattern!r} is a regular expression, which is not run")
        if f".{module}".endswith(f".{pattern.replace(chr(92), '')}"):
            return value
    return otherwise


def ends(modules: Iterable[str]) -> str:
    """A pattern of the modules' last names, which says to a reader what was targeted."""
    return "|".join(sorted({module.rpartition(".")[2] for module in modules}))


def share(source: Source, name: str) -> float:
    """A field that is a probability."""
    return float(source.field(name, 0.0))
