"""Which layers a technique touches: by role, by name pattern, by layer range; what matched, and what would."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from smidgen.delta import Side, Site
from smidgen.layers import features, input_embedding, is_linear
from smidgen.own import own_module, own_modules, own_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = {
    "attention": "the linear layers of every attention",
    "feed-forward": "the other linear layers of every block",
    "all-linear": "every linear layer of every block",
    "attention-sublayer": "every attention as a whole, from its first linear layer's input to its last one's output",
    "feed-forward-sublayer": "every feed-forward network as a whole, likewise",
    "sublayers": "both kinds of sublayer",
    "blocks": "every block's output, after its residual and, in post-norm models, its norm",
    "keys-and-values": "the layers that make keys and values; those that make queries as well, whole",
    "feed-forward-out": "the last linear layer of every feed-forward network",
}
_QUERIES = re.compile(r"(q|query)(_proj|_lin)?")
_KEYS_AND_VALUES = re.compile(r"(k|v|key|value)(_proj|_lin)?|(c_attn|query_key_value|qkv|qkv_proj|Wqkv)")


@dataclasses.dataclass(frozen=True)
class Place:
    """One place of the model, by exact module name.

    Attributes:
        name: the module's name in the model.
        layer: the module.
        source: the name of the module at the sublayer's start, where the place is a whole sublayer.
        shape: (in, out) features of a linear layer or sublayer, (key-value heads, head size) of an attention,
            (vocabulary, hidden size) of an embedding, (hidden size, hidden size) of a block.
        side: what of the layer a delta changes here.
        site: whether that is the layer's own, the keys and values of an attention, or the prompt at an embedding.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, int]
    source: str | None = None
    side: Side = "output"
    site: Site = "layer"


def find(model: PreTrainedModel, targets: str | Sequence[str] | None, layers: str = "all") -> list[Place]:
    r"""The places that `targets` names inside the blocks that `layers` names.

    Args:
        model: the model to look through.
        targets: roles (see `ROLES`) and name patterns, one or several. A pattern is a regular expression that must
            match a module's whole name or a dotted end of it: "query" or r"layer\.0\..*query".
        layers: "all", "first:N", "last:N", "FROM-TO" (both included), or numbers: "0,5,11".

    Raises:
        ValueError: a role or pattern matches nothing, or `layers` names a block that is not there.
    """
    if targets is None:
        return []
    chosen = choose_blocks(model, layers)
    places: dict[str, Place] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        found = _by_role(model, target, chosen) if target in ROLES else _by_pattern(model, target, chosen, layers)
        if not found:
            raise ValueError(_nothing(model, target, layers))
        places.update((place.name, place) for place in found)
    once: dict[tuple[int, str], Place] = {}  # a layer that several blocks share has one place, by its first name
    for place in places.values():
        once.setdefault((id(place.layer), place.side), place)
    return list(once.values())


def inputs(model: PreTrainedModel, targets: str | Sequence[str] | None, layers: str = "all") -> list[Place]:
    """The inputs of what `find` finds.

    Raises:
        ValueError: as `find`.
    """
    return [dataclasses.replace(place, side="input") for place in find(model, targets, layers)]


def embedding(model: PreTrainedModel) -> Place:
    """The input embedding of the text."""
    layer = input_embedding(model)
    name = next(name for name, module in own_modules(model) if module is layer)
    if not isinstance(layer, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__}'s input embedding is a {type(layer).__name__}; prompts need an Embedding."
        )
    return Place(name, layer, (layer.num_embeddings, layer.embedding_dim), site="embedding")


def ends(model: PreTrainedModel) -> list[Place]:
    """Where the text enters and leaves the blocks: the input of each stack's first one, and of the output embedding."""
    firsts = [stack[0] for stack in blocks(model)]
    if not firsts:
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks, so that their ends are not known.")
    places = [exact(model, name, None, "input") for name in firsts]
    output = model.get_output_embeddings()
    if output is not None:
        name = next(name for name, module in own_modules(model) if module is output)
        places.append(exact(model, name, None, "input"))
    return places


def blocks(model: nn.Module) -> list[list[str]]:
    """The names of the transformer blocks, one list a stack (an encoder-decoder has two)."""
    stacks: list[list[str]] = []
    for name, module in own_modules(model):
        inside = any(name.startswith(f"{block}.") for stack in stacks for block in stack)
        if isinstance(module, nn.ModuleList) and not inside and _are_blocks(module):
            stacks.append([f"{name}.{index}" if name else str(index) for index in range(len(module))])
    return stacks


def _are_blocks(modules: nn.ModuleList) -> bool:
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 and any(is_linear(module) for module in modules[0].modules() if module is not modules[0])


def choose_blocks(model: nn.Module, layers: str) -> list[str]:
    """The names of the blocks that `layers` names, counted in each stack by itself."""
    stacks = blocks(model)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks, so that roles cannot be found in it."
        )
    return [stack[index] for stack in stacks for index in _indices(layers, len(stack))]


def _indices(layers: str, count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    wanted: list[int] = []
    if match := re.fullmatch(r"(first|last):(\d+)", layers):
        end, size = match[1], int(match[2])
        wanted = list(range(size)) if end == "first" else list(range(count - size, count))
    elif match := re.fullmatch(r"(\d+)-(\d+)", layers):
        wanted = list(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", layers):
        wanted = [int(number) for number in layers.split(",")]
    if not wanted or not all(0 <= index < count for index in wanted):
        raise ValueError(
            f"layers={layers!r} does not name blocks of this model, which are numbered 0 to {count - 1}. "
            'Write "all", "first:2", "last:2", "0-3" or "0,2".'
        )
    return sorted(set(wanted))


def _by_role(model: nn.Module, role: str, chosen: Sequence[str]) -> list[Place]:
    found: list[Place] = []
    for block in chosen:
        module = model.get_submodule(block)
        if role in ("feed-forward", "all-linear", "feed-forward-sublayer", "sublayers", "feed-forward-out"):
            _check_experts(model, role, block)
        linears = {f"{block}.{name}": layer for name, layer in own_modules(module) if is_linear(layer)}
        attention = {name: layer for name, layer in linears.items() if _attention_part(name, block)}
        feed_forward = {name: layer for name, layer in linears.items() if name not in attention}
        if role in ("attention", "all-linear"):
            found += [Place(name, layer, features(layer)) for name, layer in attention.items()]
        if role in ("feed-forward", "all-linear"):
            found += [Place(name, layer, features(layer)) for name, layer in feed_forward.items()]
        if role in ("attention-sublayer", "sublayers"):
            parts = dict.fromkeys(_attention_part(name, block) for name in attention)
            for part in parts:
                found += _sublayer(
                    {name: layer for name, layer in attention.items() if _attention_part(name, block) == part}
                )
        if role in ("feed-forward-sublayer", "sublayers"):
            _check_one_network(model, role, feed_forward)
            found += _sublayer(feed_forward)
        if role == "keys-and-values":
            made = {name for name in attention if _KEYS_AND_VALUES.fullmatch(name.rpartition(".")[2])}
            found += [Place(name, layer, features(layer)) for name, layer in attention.items() if name in made]
        if role == "feed-forward-out":
            ends = {_kind(place.name) for place in _sublayer(feed_forward)}
            last = {name: layer for name, layer in feed_forward.items() if _kind(name) in ends}
            found += [Place(name, layer, features(layer)) for name, layer in last.items()]
        if role == "blocks":
            found.append(Place(block, module, _shape(module)))
    return found


def _check_experts(model: nn.Module, role: str, block: str) -> None:
    """Raise a ValueError if the block has experts whose weights are stacks of matrices, and no layers."""
    stacked = [
        f"{block}.{name}.{parameter}"
        for name, module in own_modules(model.get_submodule(block))
        for parameter, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and "expert" in f"{name}.{parameter}"
    ]
    if stacked:
        instead = {"feed-forward-out": None, "all-linear": "attention", "feed-forward": "attention"}
        raise ValueError(
            f"targets={role!r} would leave out {' and '.join(stacked)} of {type(model).__name__}: experts whose "
            f"weights are stacks of matrices, not layers. Use {instead.get(role, 'attention-sublayer')!r} instead."
        )


def _check_one_network(model: nn.Module, role: str, linears: Iterable[str]) -> None:
    """Raise a ValueError if the feed-forward layers are those of experts, each of which sees some tokens alone."""
    if inside := next((name for name in linears if ".experts." in name), None):
        raise ValueError(
            f"targets={role!r} would act on the tokens of one expert alone, as {inside} of {type(model).__name__}. "
            "Use 'attention-sublayer' instead."
        )


def _kind(name: str) -> str:
    """A layer's name without numbers: the same for all blocks, and for all experts of one."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _attention_part(name: str, block: str) -> str:
    """The name up to the part that is an attention, such as layer.0.attention; empty for other layers."""
    parts = name.removeprefix(f"{block}.").split(".")
    for index, part in enumerate(parts[:-1]):
        if "attn" in part.lower() or "attention" in part.lower():
            return ".".join(parts[: index + 1])
    return ""


def _sublayer(linears: dict[str, nn.Module]) -> list[Place]:
    """The sublayer of these linear layers: it ends at the last one that gives the size that the first one takes.

    Of an attention the first is the queries' layer, wherever it stands: keys and values may be of another text.
    """
    if not linears:
        return []
    source = next((name for name in linears if _QUERIES.fullmatch(name.rpartition(".")[2])), next(iter(linears)))
    size = features(linears[source])[0]
    ends = [name for name, layer in linears.items() if features(layer)[1] == size and name != source]
    return [Place(ends[-1], linears[ends[-1]], (size, size), source)] if ends else []


def _by_pattern(model: nn.Module, pattern: str, chosen: Sequence[str], layers: str) -> list[Place]:
    expression = compiled(pattern, f"targets={pattern!r} is neither a role ({', '.join(ROLES)}) nor a pattern")
    inside = tuple(f"{block}." for block in chosen)
    return [
        Place(name, layer, features(layer))
        for name, layer in own_modules(model)
        if is_linear(layer) and expression.fullmatch(name) and (layers == "all" or name.startswith(inside))
    ]


def compiled(pattern: str, otherwise: str) -> re.Pattern[str]:
    """The expression that matches a whole name or a dotted end of it.

    Raises:
        ValueError: it is not one; the message begins with `otherwise`.
    """
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"{otherwise}: {error}.") from None


def _nothing(model: nn.Module, target: str, layers: str) -> str:
    names = sorted({name.rpartition(".")[2] for name, layer in own_modules(model) if is_linear(layer)})
    nearest = difflib.get_close_matches(target, [*ROLES, *names], n=1)
    where = "" if layers == "all" else f" in layers={layers!r}"
    return (
        f"targets={target!r} matches no layer of {type(model).__name__}{where}. "
        f"Its linear layers: {', '.join(names)}. Roles: {', '.join(ROLES)}."
        + (f" Did you mean {nearest[0]!r}?" if nearest else "")
    )


def report(model: nn.Module, places: Sequence[Place]) -> list[str]:
    """What matched, a line for each kind of layer, uneven matches marked: 'attention.self.query: 6 of 6 blocks'."""
    stacks = {block: index for index, stack in enumerate(blocks(model)) for block in stack}
    sizes = Counter(stacks.values())
    kinds: Counter[tuple[int, str]] = Counter()
    outside: list[str] = []
    for place in places:
        owner = next((block for block in stacks if place.name == block or place.name.startswith(f"{block}.")), None)
        if owner is None:
            outside.append(place.name)
        else:
            kinds[stacks[owner], place.name.removeprefix(owner).removeprefix(".") or "whole block"] += 1
    lines = [f"{kind}: {count} of {sizes[stack]} blocks" for (stack, kind), count in kinds.items()]
    return lines + [f"{name}: outside the blocks" for name in outside]


def check_linear(title: str, targets: str) -> None:
    """Raise a ValueError if `targets` is a role of something else than linear layers."""
    if targets == "blocks" or "sublayer" in targets:
        raise ValueError(
            f"{title}'s targets must be linear layers, such as all-linear, attention or feed-forward, got {targets!r}."
        )


def own_parameters_inside(model: nn.Module, layers: str) -> list[str]:
    """Names of the model's own parameters inside the blocks that `layers` names; for "all", outside them as well."""
    inside = tuple(f"{block}." for block in choose_blocks(model, layers))
    return [name for name, _ in own_parameters(model) if layers == "all" or name.startswith(inside)]


def norm_parameters(model: nn.Module, layers: str, *, inside_only: bool = False) -> list[str]:
    """Names of the norms' parameters inside the blocks that `layers` names; for "all", outside them as well."""
    norms = {name for name, module in own_modules(model) if "norm" in type(module).__name__.lower()}
    inside = tuple(f"{block}." for block in choose_blocks(model, layers)) if inside_only else ("",)
    found = own_parameters_inside(model, layers)
    return [name for name in found if name.rpartition(".")[0] in norms and name.startswith(inside)]


def exact(model: nn.Module, name: str, source: str | None, side: Side) -> Place:
    """The place with exactly this name, for an adapter that is read from a file: nothing is searched for.

    Raises:
        ValueError: the model has no such module.
    """
    layer = _taking(model, name)
    shape = _shape(layer) if source is None else (_shape(_taking(model, source))[0], _shape(layer)[1])
    return Place(name, layer, shape, source, side)


def _taking(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, if it takes a delta."""
    module = own_module(model, name)
    if module is None:
        raise ValueError(f"The adapter has a place {name!r} that {type(model).__name__} does not have.")
    if not any(is_linear(inner) or isinstance(inner, nn.Embedding) for _, inner in own_modules(module)):
        raise ValueError(f"The adapter's place {name!r} is a {type(module).__name__}, which takes no delta.")
    return module


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; of a block, the size that its first linear layer takes, twice."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if is_linear(layer):
        return features(layer)
    size = features(next(module for _, module in own_modules(layer) if is_linear(module)))[0]
    return size, size
