"""Read the adapter folders of huggingface/peft as our own adapters.

Facts of peft 0.21.2: `adapter_config.json` and `adapter_model.safetensors`, whose names begin with `base_model.model.`;
a prompt is one tensor, `prompt_embeddings`; a prefix is that, too, with all layers' keys and values side by side. What
has no counterpart here is refused with the reason. No pattern of a file is run, and no pickle is opened.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from smidgen import attention, files, storage, targets
from smidgen.delta import Method, Side
from smidgen.errors import UserError
from smidgen.methods import (
    HRA,
    IA3,
    OFT,
    DoRA,
    HeadOnly,
    LlamaAdapter,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    RsLoRA,
    VeRA,
)
from smidgen.own import head_names, own_parameters
from smidgen.targets import Place
from smidgen.tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = TypeVar("Key")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

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


def is_peft(path: Path) -> bool:
    """Whether the folder is an adapter that peft wrote."""
    return (path / CONFIG).is_file()


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
        return {_module(name.removesuffix(f".{ending}")): tensor for name, tensor in found.items()}

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


def _module(name: str) -> str:
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def read(model: PreTrainedModel, path: Path, *, head: bool = True) -> storage.Saved:
    """Read the folder that peft wrote, with or without its head, and check it against `model`, left as it is.

    Raises:
        UserError: the folder is damaged, holds a pickle, or an adapter that has no counterpart here.
    """
    for name in (CONFIG, TENSORS):
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a link; an adapter's files must lie in its folder.")
    if not (path / TENSORS).is_file():
        raise UserError(f"{path} has no {TENSORS}. A pickle, {path / 'adapter_model.bin'}, is never opened.")
    config = files.read_json(path / CONFIG)
    kind = str(config.get("peft_type"))
    try:
        if kind not in READERS:
            raise ValueError(f"peft_type={kind} has no counterpart here; known: {', '.join(READERS)}")
        source = Source(model, config, read_tensors(path / TENSORS))
        parts = READERS[kind](source)
        own = _own(source)
        source.check_used()
        methods = [part.method for part in parts]
        places = [[place for place, _ in part.states] for part in parts]
        tensors = {
            f"{place.name}.{part.method.name}.{name}": tensor
            for part in parts
            for place, state in part.states
            for name, tensor in state.items()
        }
        tensors |= own
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        without = None if head else [name for name in head_names(model) if name in own]
        return storage.filled(
            model, _name(path), methods, places, list(own), None, shapes, lambda: tensors, without=without
        )
    except KeyError as error:
        raise UserError(f"{path} is incomplete: a tensor or a field of {error} is missing.") from error
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no peft adapter for this {type(model).__name__}: {error}") from error


def _name(path: Path) -> str:
    """The folder's name, as far as it can be an adapter's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:64] or "peft"


def _own(source: Source) -> dict[str, Tensor]:
    """What is left: the model's own parameters that were trained whole, biases, norms, and rows of the embedding."""
    own = {f"{module}.bias": tensor for module, tensor in source.take("base_layer.bias").items()}
    tokens = source.field("trainable_token_indices", source.field("token_indices"))
    for ending in ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"):
        for module, rows in source.take(ending).items():
            ids = tokens if isinstance(tokens, list) else next(ids for k, ids in tokens.items() if module.endswith(k))
            table = source.model.get_parameter(f"{module}.weight").detach().clone()
            table[torch.tensor(ids, device=table.device)] = rows.to(table)
            own[f"{module}.weight"] = table
    parameters = dict(own_parameters(source.model))
    for name, tensor in list(source.tensors.items()):
        del source.tensors[name]
        if ".original_module." in name:  # with bias="all" the head's bias is there three times: this one is not trained
            continue
        plain = _module(name).replace(".ln_tuning_layers.", ".").replace(".modules_to_save.", ".")
        plain = plain if plain in parameters else _module(f"base_model.{plain}")
        if plain not in parameters:
            raise ValueError(f"its tensor {name!r} belongs to nothing in the model")
        own[plain] = tensor
    return own


def _lora(source: Source) -> list[Part]:
    start = source.field("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"its init_lora_weights={start!r} changed the weights of the base model")
    if source.field("target_parameters"):
        raise ValueError("it adapts parameters that no layer of their own has (target_parameters)")
    a, b = source.need("lora_A.weight"), source.need("lora_B.weight")
    magnitudes = source.take("lora_magnitude_vector") if source.field("use_dora") else {}
    alpha, patterns = source.field("lora_alpha", 8), source.field("alpha_pattern", {})
    stabilized = bool(source.field("use_rslora"))
    if stabilized and magnitudes:
        raise ValueError("it is DoRA scaled as rsLoRA (use_dora and use_rslora together)")
    groups = _grouped(a, lambda module: (a[module].shape[0], float(_by_name(patterns, module, alpha))))
    method: type[LoRA | RsLoRA | DoRA] = DoRA if magnitudes else RsLoRA if stabilized else LoRA
    prefix = "direction." if magnitudes else ""
    return [
        Part(
            method(rank=rank, alpha=own_alpha, dropout=_share(source, "lora_dropout"), targets=_ends(modules)),
            [
                (
                    source.place(module),
                    {f"{prefix}a": a[module], f"{prefix}b": b[module]}
                    | ({"magnitude": magnitudes[module].flatten()} if magnitudes else {}),
                )
                for module in modules
            ],
        )
        for (rank, own_alpha), modules in groups.items()
    ]


def _adalora(source: Source) -> list[Part]:
    """As LoRA with the singular values in B: the ranks are found, and only the update is left."""
    source.field("init_lora_weights")
    a, b, e = (source.need(f"lora_{letter}") for letter in "ABE")
    scale = float(source.field("lora_alpha", 8)) / (float(source.field("init_r", 12)) + 1e-5)  # as peft has it
    dropout = _share(source, "lora_dropout")
    groups = _grouped((m for m in a if len(a[m])), lambda module: a[module].shape[0])  # others have lost all of theirs
    if not groups:
        raise ValueError("its ranks have all fallen to 0")
    return [
        Part(
            LoRA(rank=rank, alpha=float(rank), dropout=dropout, targets=_ends(modules)),
            [(source.place(m), {"a": a[m], "b": b[m] * e[m].flatten() * scale}) for m in modules],
        )
        for rank, modules in groups.items()
    ]


def _ia3(source: Source) -> list[Part]:
    vectors = source.need("ia3_l")
    inputs = [module for module, vector in vectors.items() if vector.shape[0] == 1]
    outputs = [module for module in vectors if module not in inputs]
    method = IA3(outputs=_ends(outputs) if outputs else None, inputs=_ends(inputs) if inputs else None)
    return [
        Part(
            method,
            [(source.place(module), {"scale": vectors[module].flatten()}) for module in outputs]
            + [(source.place(module, "input"), {"scale": vectors[module].flatten()}) for module in inputs],
        )
    ]


def _vera(source: Source) -> list[Part]:
    d, b = source.need("vera_lambda_d"), source.need("vera_lambda_b")
    if "base_model.vera_A" not in source.tensors:
        raise ValueError("it was saved without its projections (save_projection=False), which only peft can draw again")
    shared = {f"shared.{name.lower()}": source.tensors.pop(f"base_model.vera_{name}") for name in "AB"}
    states = [(source.place(module), {"d": d[module], "b": b[module]}) for module in d]
    states[0][1].update(shared)
    rank = next(iter(d.values())).shape[0]
    return [Part(VeRA(rank=rank, seed=None, dropout=_share(source, "vera_dropout"), targets=_ends(d)), states)]


def _loha(source: Source) -> list[Part]:
    names = {"a1": "hada_w1_b", "a2": "hada_w2_b", "b1": "hada_w1_a", "b2": "hada_w2_a"}
    found = {ours: source.need(theirs) for ours, theirs in names.items()}
    a, alpha, patterns = found["a1"], source.field("alpha", 8), source.field("alpha_pattern", {})
    groups = _grouped(a, lambda module: (a[module].shape[0], float(_by_name(patterns, module, alpha))))
    return [
        Part(
            LoHa(rank=rank, alpha=own_alpha, targets=_ends(modules)),
            [(source.place(m), {ours: tensors[m] for ours, tensors in found.items()}) for m in modules],
        )
        for (rank, own_alpha), modules in groups.items()
    ]


def _lokr(source: Source) -> list[Part]:
    if any(name.endswith((".lokr_w1_a", ".lokr_t2")) for name in source.tensors):
        raise ValueError("its first factor is low-rank as well (decompose_both), or it is of convolutions")
    c, d = source.need("lokr_w1"), source.take("lokr_w2")
    b, a = source.take("lokr_w2_a"), source.take("lokr_w2_b")
    factor, ranks = int(source.field("decompose_factor", -1)), source.field("rank_pattern", {})
    alphas = source.field("alpha_pattern", {})
    rank, alpha = source.field("r", 8), source.field("alpha", 8)
    groups = _grouped(c, lambda m: (int(_by_name(ranks, m, rank)), float(_by_name(alphas, m, alpha))))
    return [
        Part(
            LoKr(rank=rank, alpha=alpha, factor=None if factor == -1 else factor, targets=_ends(modules)),
            [(source.place(m), {"c": c[m]} | ({"d": d[m]} if m in d else {"a": a[m], "b": b[m]})) for m in modules],
        )
        for (rank, alpha), modules in groups.items()
    ]


def _miss(source: Source) -> list[Part]:
    if source.field("init_weights") in ("bat", "mini"):
        raise ValueError(f"its init_weights={source.field('init_weights')!r} is another kind of MiSS")
    source.field("mini_r")
    d = source.need("miss_block")
    groups = _grouped(d, lambda module: d[module].shape[0])
    return [
        Part(
            MiSS(rank=rank, dropout=_share(source, "miss_dropout"), targets=_ends(modules)),
            [(source.place(module), {"d": d[module]}) for module in modules],
        )
        for rank, modules in groups.items()
    ]


def _oft(source: Source) -> list[Part]:
    if source.field("coft") or source.field("block_share"):
        raise ValueError("it is constrained, or its blocks are shared (coft, block_share)")
    skew = source.need("oft_R.weight")
    terms = int(source.field("num_cayley_neumann_terms", 5))
    terms = 4 if terms == 3 else terms  # which are the same there
    source.field("oft_block_size")  # where `r` says how many blocks there are, each layer has its own
    summed = terms if source.field("use_cayley_neumann") else None
    groups = _grouped(skew, lambda module: _side(skew[module].shape[1]))
    return [
        Part(
            OFT(block_size=size, terms=summed, targets=_ends(modules)),
            [(source.place(module, "input"), {"skew": skew[module]}) for module in modules],
        )
        for size, modules in groups.items()
    ]


def _side(entries: int) -> int:
    """The side of a skew matrix with so many entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def _hra(source: Source) -> list[Part]:
    if source.field("apply_GS"):
        raise ValueError("its vectors are orthogonalized (apply_GS)")
    u = source.need("hra_u")
    rank = next(iter(u.values())).shape[1]
    method = HRA(rank=rank, targets=_ends(u))
    return [Part(method, [(source.place(m, "input"), {"u": tensor.T.contiguous()}) for m, tensor in u.items()])]


def _norms(source: Source) -> list[Part]:
    return [Part(NormTuning(), [])]


def _prefix(source: Source) -> list[Part]:
    if source.model.config.is_encoder_decoder:
        raise ValueError("its prefix goes to the decoder alone; here every attention of an encoder-decoder has one")
    flat, places = source.tensors.pop("prompt_embeddings"), attention.find(source.model)
    sizes = [2 * heads * size for heads, size in (place.shape for place in places)]
    if sum(sizes) != flat.shape[1]:
        raise ValueError(f"its prefix has {flat.shape[1]} numbers a token; the model's attentions take {sum(sizes)}")
    states = []
    for place, part in zip(places, flat.split(sizes, dim=1), strict=True):
        states.append((place, {"keys_values": part.view(len(flat), 2, *place.shape).transpose(0, 1).contiguous()}))
    return [Part(PrefixTuning(length=len(flat), start="random"), states)]


def _prompt(source: Source) -> list[Part]:
    rows = source.tensors.pop("prompt_embeddings")
    if len(rows) > source.config["num_virtual_tokens"]:  # num_transformer_submodules=2
        raise ValueError("it has a second prompt, which goes before the decoder's text")
    method = PromptTuning(length=len(rows), start="random", placement="first")
    return [Part(method, [(targets.embedding(source.model), {"rows": rows})])]


def _adaption_prompt(source: Source) -> list[Part]:
    """Its prompts, as the keys and values that the layers' frozen projections make of them."""
    prompts, gates = source.need("adaption_prompt"), source.need("adaption_gate")
    known = {place.name: place for place in attention.find(source.model)}
    states = []
    for name, prompt in prompts.items():
        if name not in known:
            raise ValueError(f"its prompt is at {name!r}, which is no attention of this model that takes one")
        layer: Any = known[name].layer
        if not all(hasattr(layer, projection) for projection in ("k_proj", "v_proj", "o_proj")):
            raise ValueError("peft adds its prompt behind this model's output projection, and here it comes before it")
        with torch.no_grad():
            made = torch.cat([projection(prompt.to(projection.weight)) for projection in (layer.k_proj, layer.v_proj)])
        keys_values = made.view(2, prompt.shape[1], *known[name].shape).float()
        states.append((known[name], {"keys_values": keys_values, "gate": gates[name]}))
    layers = "all" if len(states) == len(known) else f"last:{len(states)}"
    return [Part(LlamaAdapter(length=source.field("adapter_len"), layers=layers), states)]


def _tokens(source: Source) -> list[Part]:
    """Rows of the embedding alone, which `_own` reads."""
    return [Part(HeadOnly(), [])]


READERS: dict[str, Callable[[Source], list[Part]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "VERA": _vera,
    "LOHA": _loha,
    "LOKR": _lokr,
    "MISS": _miss,
    "OFT": _oft,
    "HRA": _hra,
    "LN_TUNING": _norms,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
    "ADAPTION_PROMPT": _adaption_prompt,
    "TRAINABLE_TOKENS": _tokens,
}


def _grouped(modules: Iterable[str], key: Callable[[str], Key]) -> dict[Key, list[str]]:
    """The modules that have the same key, in their order: a technique of ours has one rank and one scale."""
    groups: dict[Key, list[str]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def _by_name(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """What a pattern that is a name, or the dotted end of one, says of a module; others are refused, not run."""
    for pattern, value in patterns.items():
        if not all(letter.isalnum() or letter in "._" for letter in pattern.replace("\\.", ".")):
            raise ValueError(f"its pattern {pattern!r} is a regular expression, which is not run")
        if f".{module}".endswith(f".{pattern.replace(chr(92), '')}"):
            return value
    return otherwise


def _ends(modules: Iterable[str]) -> str:
    """A pattern of the modules' last names, which says to a reader what was targeted."""
    return "|".join(sorted({module.rpartition(".")[2] for module in modules}))


def _share(source: Source, name: str) -> float:
    return float(source.field(name, 0.0))
