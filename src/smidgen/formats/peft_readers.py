"""The techniques of huggingface/peft 0.21.2 as our own: what each of its kinds of adapter holds, and where it goes.

What has no counterpart here is refused with the reason. No pattern of a file is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from smidgen import attention, targets
from smidgen.formats.peft_source import Part, Source, by_name, ends, grouped, share
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
    groups = grouped(a, lambda module: (a[module].shape[0], float(by_name(patterns, module, alpha))))
    method: type[LoRA | RsLoRA | DoRA] = DoRA if magnitudes else RsLoRA if stabilized else LoRA
    prefix = "direction." if magnitudes else ""
    return [
        Part(
            method(rank=rank, alpha=own_alpha, dropout=share(source, "lora_dropout"), targets=ends(modules)),
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
    dropout = share(source, "lora_dropout")
    groups = grouped((m for m in a if len(a[m])), lambda module: a[module].shape[0])  # others have lost all of theirs
    if not groups:
        raise ValueError("its ranks have all fallen to 0")
    return [
        Part(
            LoRA(rank=rank, alpha=float(rank), dropout=dropout, targets=ends(modules)),
            [(source.place(m), {"a": a[m], "b": b[m] * e[m].flatten() * scale}) for m in modules],
        )
        for rank, modules in groups.items()
    ]


def _ia3(source: Source) -> list[Part]:
    vectors = source.need("ia3_l")
    inputs = [module for module, vector in vectors.items() if vector.shape[0] == 1]
    outputs = [module for module in vectors if module not in inputs]
    method = IA3(outputs=ends(outputs) if outputs else None, inputs=ends(inputs) if inputs else None)
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
    return [Part(VeRA(rank=rank, seed=None, dropout=share(source, "vera_dropout"), targets=ends(d)), states)]


def _loha(source: Source) -> list[Part]:
    names = {"a1": "hada_w1_b", "a2": "hada_w2_b", "b1": "hada_w1_a", "b2": "hada_w2_a"}
    found = {ours: source.need(theirs) for ours, theirs in names.items()}
    a, alpha, patterns = found["a1"], source.field("alpha", 8), source.field("alpha_pattern", {})
    groups = grouped(a, lambda module: (a[module].shape[0], float(by_name(patterns, module, alpha))))
    return [
        Part(
            LoHa(rank=rank, alpha=own_alpha, targets=ends(modules)),
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
    groups = grouped(c, lambda m: (int(by_name(ranks, m, rank)), float(by_name(alphas, m, alpha))))
    return [
        Part(
            LoKr(rank=rank, alpha=alpha, factor=None if factor == -1 else factor, targets=ends(modules)),
            [(source.place(m), {"c": c[m]} | ({"d": d[m]} if m in d else {"a": a[m], "b": b[m]})) for m in modules],
        )
        for (rank, alpha), modules in groups.items()
    ]


def _miss(source: Source) -> list[Part]:
    if source.field("init_weights") in ("bat", "mini"):
        raise ValueError(f"its init_weights={source.field('init_weights')!r} is another kind of MiSS")
    source.field("mini_r")
    d = source.need("miss_block")
    groups = grouped(d, lambda module: d[module].shape[0])
    return [
        Part(
            MiSS(rank=rank, dropout=share(source, "miss_dropout"), targets=ends(modules)),
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
    groups = grouped(skew, lambda module: _side(skew[module].shape[1]))
    return [
        Part(
            OFT(block_size=size, terms=summed, targets=ends(modules)),
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
    method = HRA(rank=rank, targets=ends(u))
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
