"""What an adapter has learned, in terms that a person can read: words, spectra, scales."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from smidgen.delta import Delta
from smidgen.layers import embedding_rows, is_quantized, weight_matrix
from smidgen.methods.hard_prompt import HardPromptDelta
from smidgen.methods.ia3 import IA3Delta
from smidgen.methods.unipelt import GatedDelta
from smidgen.updates import change

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smidgen.adapter import Adapter


ROUNDING = 1e-6
"""Of a weight's norm: a change that is no larger is none."""

Told = tuple[str, list[tuple[str, float]]]
"""What the numbers are, and each number with its name."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a delta has learned.

    Attributes:
        technique: its title.
        place: its module in the model.
        about: what the numbers are, in a sentence.
        values: each number with its name.
    """

    technique: str
    place: str
    about: str
    values: list[tuple[str, float]]


def explain(adapter: Adapter, tokenizer: PreTrainedTokenizerBase | None = None, *, most: int = 8) -> list[Explanation]:
    """What each delta has learned, where there is a way to say it.

    - a prompt: for each virtual token the words whose embeddings are nearest, by cosine; a hard prompt's own words;
    - a change of a weight: the largest singular values, and how many directions carry 90 % of it;
    - (IA)³: the scales farthest from 1, less 1;
    - a gate: how far it is open, where it reads tokens for one of zeros.

    Args:
        adapter: the adapter.
        tokenizer: the model's, for words; prompts are left out without it.
        most: how many values of each delta.

    Returns:
        One for each delta that can be explained, in the order of the adapter's entries.
    """
    return [
        Explanation(method.title, place.name, about, values)
        for method, place, delta in adapter.entries()
        for about, values in _told(delta, place.layer, tokenizer, most)
    ]


@torch.no_grad()
def _told(delta: Delta, layer: nn.Module, tokenizer: PreTrainedTokenizerBase | None, most: int) -> list[Told]:
    gate = delta.gate_value()
    found = [] if gate is None else [_gate(gate)]
    if isinstance(delta, GatedDelta):
        return found + _told(delta.inner, layer, tokenizer, most)
    if isinstance(delta, IA3Delta):
        found.append(_scales(delta, most))
    elif type(delta).update is not Delta.update:
        found.append(_spectrum(_core(delta) if delta.low_rank else delta.update(), most))
    elif delta.mergeable and not is_quantized(layer):  # which changes the weight by a product or a norm, and is rounded
        update = change(layer, [delta])
        is_rounding = update.norm() <= ROUNDING * weight_matrix(layer).norm()
        found.append(_spectrum(torch.zeros_like(update) if is_rounding else update, most))
    elif tokenizer is not None and isinstance(delta, HardPromptDelta):
        found.append(_typed(delta, layer, tokenizer))
    elif tokenizer is not None and "rows" in (folded := delta.folded(layer)):
        found.append(_words(folded["rows"].float(), embedding_rows(layer).float(), tokenizer))
    return found


def _gate(gate: torch.Tensor) -> Told:
    return "how far its gate is open", [("gate", float(gate))]


def _typed(delta: HardPromptDelta, layer: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Told:
    ids = delta.tokens(layer).tolist()
    text = tokenizer.decode(ids)
    same = tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    about = f"the wording {text!r}" + ("" if same else ", whose tokens are others when it is typed")
    return about, [(str(tokenizer.decode([token])), 1.0) for token in ids]


def _words(rows: torch.Tensor, table: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> Told:
    likeness = nn.functional.normalize(rows, dim=1) @ nn.functional.normalize(table, dim=1).T
    best = likeness.topk(3, dim=1)
    words = [" ".join(str(tokenizer.decode([token])).strip() or "␣" for token in row) for row in best.indices.tolist()]
    return "the words nearest to each virtual token, by cosine", list(
        zip(words, best.values[:, 0].tolist(), strict=True)
    )


def _scales(delta: IA3Delta, most: int) -> Told:
    distances = (delta.scale - 1).abs()
    farthest = distances.topk(min(most, len(distances))).indices.tolist()
    what = "input" if delta.of_input else "output"
    about = f"the scales of the layer's {what} farthest from 1, less 1"
    return about, [(f"number {index}", float(delta.scale[index]) - 1) for index in farthest]


def _core(delta: Delta) -> torch.Tensor:
    """A small matrix with the singular values of an update of low rank, whose own would take long."""
    a, b, scale = delta.low_rank_factors()
    first, second = torch.linalg.qr(b.float(), mode="r").R, torch.linalg.qr(a.float().T, mode="r").R
    core: torch.Tensor = scale * first @ second.T
    return core


def _spectrum(update: torch.Tensor, most: int) -> Told:
    values = torch.linalg.svdvals(update)
    if not float(values[0]):
        return "no update: all of it is zero", []
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
    directions = int((shares < 0.9).sum()) + 1
    about = f"singular values of the update; {directions} hold 90 % of the square"
    return about, [(f"σ{index}", float(value)) for index, value in enumerate(values[:most], start=1)]
