"""Our techniques as huggingface/peft 0.21.2 has them: the fields of a configuration, and the tensors by its names."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import attention
from smidgen.delta import Method
from smidgen.errors import UserError
from smidgen.methods import (
    HRA,
    IA3,
    OFT,
    DoRA,
    HardPrompt,
    LlamaAdapter,
    LoHa,
    LoKr,
    MiSS,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
)
from smidgen.methods.dora import DoRADelta
from smidgen.targets import Place
from smidgen.updates import Factors, changes, compact, nearest

if TYPE_CHECKING:
    from smidgen.adapter import Adapter


@dataclasses.dataclass
class Layered:
    """One technique of an adapter."""

    adapter: Adapter
    number: int

    @property
    def method(self) -> Any:
        """The technique."""
        return self.adapter.methods[self.number]

    @property
    def places(self) -> list[Place]:
        """Where its deltas are."""
        return self.adapter.places[self.number]

    @property
    def deltas(self) -> list[Any]:
        """Its deltas, of the technique's own kind."""
        return self.adapter.deltas[self.number]


@dataclasses.dataclass
class Written:
    """What goes into a folder: the configuration's fields, and the tensors by peft's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    lost: float = 0.0


def low_rank(adapter: Adapter) -> Written:
    """LoRA and its kin, all of an adapter's as one."""
    found = {place.name: compact(delta.low_rank_factors()) for _, place, delta in adapter.entries()}
    if len(found) < sum(map(len, adapter.places)):
        raise UserError("peft has one LoRA a layer, and here two meet.")
    return _lora_of(found, {getattr(method, "dropout", 0.0) for method, _, _ in adapter.entries()})


def _lora_of(found: Mapping[str, Factors], dropouts: Collection[float] = ()) -> Written:
    """LoRA of these factors; peft has one dropout for all of them, 0 where they differ."""
    ranks = {name: a.shape[0] for name, (a, _, _) in found.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return Written(
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": next(iter(dropouts)) if len(dropouts) == 1 else 0.0,
            "target_modules": sorted(found),
            "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
            "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
        },
        {
            _name(name, f"lora_{letter}.weight"): factor
            for name, (a, b, _) in found.items()
            for letter, factor in (("A", a), ("B", b))
        },
    )


def by_svd(adapter: Adapter, rank: int) -> Written:
    """LoRA of a rank that is nearest to each layer's change of its weight."""
    try:
        updates = changes(adapter)
    except ValueError as error:
        raise UserError(f"No LoRA can stand for this adapter: {error}") from error
    if not updates:
        title = " + ".join(method.title for method in adapter.methods)
        raise UserError(f"{title} changes no linear layer, for which a LoRA of rank={rank} could stand. Give no rank.")
    found, lost = nearest(updates, rank)
    return dataclasses.replace(_lora_of(found), lost=lost)


def _dora(part: Layered) -> Written:
    directions = {p.name: d for p, d in zip(part.places, part.deltas, strict=True) if isinstance(d, DoRADelta)}
    factors = {name: delta.direction.low_rank_factors() for name, delta in directions.items()}
    written = _lora_of(factors, [part.method.dropout])
    written.config["use_dora"] = True
    written.tensors.update(
        {_name(name, "lora_magnitude_vector"): delta.magnitude for name, delta in directions.items()}
    )
    return written


def _ia3(part: Layered) -> Written:
    inputs = [place.name for place in part.places if place.side == "input"]
    config = {
        "peft_type": "IA3",
        "target_modules": [place.name for place in part.places],
        "feedforward_modules": inputs,
    }
    vectors = {place.name: (delta.scale, place.side) for place, delta in zip(part.places, part.deltas, strict=True)}
    shaped = {name: scale[None] if side == "input" else scale[:, None] for name, (scale, side) in vectors.items()}
    return Written(config, {_name(name, "ia3_l"): vector for name, vector in shaped.items()})


def _layered(
    kind: str, names: Mapping[str, str], fields: Callable[[Any], dict[str, Any]]
) -> Callable[[Layered], Written]:
    """A writer of a technique whose tensors, ours to theirs, have the same shapes; `fields` are of its method."""

    def write(part: Layered) -> Written:
        tensors = {
            _name(place.name, theirs): getattr(delta, ours)
            for place, delta in zip(part.places, part.deltas, strict=True)
            for ours, theirs in names.items()
            if hasattr(delta, ours)
        }
        targets = [place.name for place in part.places]
        return Written({"peft_type": kind, "target_modules": targets, **fields(part.method)}, tensors)

    return write


def _vera(part: Layered) -> Written:
    names = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    written = _layered(
        "VERA",
        names,
        lambda method: {"r": method.rank, "vera_dropout": method.dropout, "save_projection": True},
    )(part)
    shared = part.deltas[0].shared
    written.tensors |= {"base_model.vera_A": shared.a, "base_model.vera_B": shared.b}
    return written


def _oft(part: Layered) -> Written:
    if part.method.terms == 3:
        raise ValueError("it sums 4 terms of the series where 3 are asked for")
    fields = {
        "r": 0,
        "oft_block_size": part.method.block_size,
        "use_cayley_neumann": part.method.terms is not None,
        "num_cayley_neumann_terms": part.method.terms or 5,
    }
    return _layered("OFT", {"skew": "oft_R.weight"}, lambda method: fields)(part)


def _hra(part: Layered) -> Written:
    written = _layered("HRA", {"u": "hra_u"}, lambda method: {"r": method.rank})(part)
    written.tensors = {name: tensor.T for name, tensor in written.tensors.items()}
    return written


def norms(adapter: Adapter) -> Written:
    """Norm tuning, which trains the model's own parameters."""
    parameters = dict(adapter.named_parameters())
    own = sorted(adapter.own_names - adapter.head_names)
    modules = sorted({name.rpartition(".")[0] for name in own})
    named = {name: name.rpartition(".") for name in own}
    return Written(
        {"peft_type": "LN_TUNING", "target_modules": modules},
        {_name(module, f"ln_tuning_layers.{last}"): parameters[name] for name, (module, _, last) in named.items()},
    )


def _prefix(part: Layered) -> Written:
    if part.adapter.model.main_input_name != "input_ids":
        raise ValueError("it passes a prefix over in a model that reads no text")
    if part.adapter.model.config.is_encoder_decoder:
        raise ValueError("its prefix of an encoder-decoder goes to the decoder alone, and here every attention has one")
    if [place.name for place in part.places] != [place.name for place in attention.find(part.adapter.model)]:
        raise ValueError("it has a prefix in every layer, and here some have none")
    shapes = {place.shape for place in part.places}
    if len(shapes) > 1:
        raise ValueError("it has one size of keys and values, and the model's layers differ")
    folded = [delta.folded(place.layer)["keys_values"] for place, delta in zip(part.places, part.deltas, strict=True)]
    heads, size = shapes.pop()
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in folded], dim=1)
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": flat.shape[0],
        "num_layers": len(part.places),
        "token_dim": heads * size,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
    }
    return Written(config, {"prompt_embeddings": flat})


def _adaption_prompt(part: Layered) -> Written:
    raise ValueError("its keys and values are projections of a prompt, and here they are trained themselves")


def _prompt(part: Layered) -> Written:
    if part.deltas[0].column:
        raise ValueError(
            "it puts a prompt before the text, and here it stands after the first token. Train it with placement: first"
        )
    rows = part.deltas[0].folded(part.places[0].layer)["rows"]
    config = part.adapter.model.config
    fields = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return Written(fields, {"prompt_embeddings": rows})


def _name(module: str, ending: str) -> str:
    return f"base_model.model.{module}.{ending}"


WRITERS: dict[type[Method], Callable[[Layered], Written]] = {
    DoRA: _dora,
    IA3: _ia3,
    VeRA: _vera,
    LoHa: _layered(
        "LOHA",
        {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"},
        lambda method: {"r": method.rank, "alpha": method.alpha},
    ),
    LoKr: _layered(
        "LOKR",
        {"c": "lokr_w1", "d": "lokr_w2", "b": "lokr_w2_a", "a": "lokr_w2_b"},
        lambda method: {"r": method.rank, "alpha": method.alpha, "decompose_factor": method.factor or -1},
    ),
    MiSS: _layered("MISS", {"d": "miss_block"}, lambda method: {"r": method.rank, "miss_dropout": method.dropout}),
    OFT: _oft,
    HRA: _hra,
    PrefixTuning: _prefix,
    PTuningV2: _prefix,
    PromptTuning: _prompt,
    PTuning: _prompt,
    HardPrompt: _prompt,
    LlamaAdapter: _adaption_prompt,
}
"""Who writes each technique that peft has; LoRA and its kin are written together."""
