"""What an adapter has learned, in terms that a person can read: words, spectra, scales."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from smidgen.delta import Delta
from smidgen.layers import embedding_rows
from smidgen.methods.hard_prompt import HardPromptDelta
from smidgen.methods.ia3 import IA3Delta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smidgen.adapter import Adapter


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
    - an update of a weight: the largest singular values, and how many directions carry 90 % of it;
    - (IA)³: the scales farthest from 1, less 1.

    Args:
        adapter: the adapter.
        tokenizer: the model's, for words; prompts are left out without it.
        most: how many values of each delta.

    Returns:
        One for each delta that can be explained, in the order of the adapter's entries.
    """
    found = []
    for method, place, delta in adapter.entries():
        told = _told(delta, place.layer, tokenizer, most)
        if told is not None:
            found.append(Explanation(method.title, place.name, *told))
    return found


@torch.no_grad()
def _told(
    delta: Delta, layer: nn.Module, tokenizer: PreTrainedTokenizerBase | None, most: int
) -> tuple[str, list[tuple[str, float]]] | None:
    if isinstance(delta, HardPromptDelta) and tokenizer is not None:
        return _typed(delta, layer, tokenizer)
    folded = delta.folded(layer)
    if "rows" in folded and tokenizer is not None:
        return _words(folded["rows"].float(), embedding_rows(layer).float(), tokenizer)
    if isinstance(delta, IA3Delta):
        return _scales(delta, most)
    if type(delta).update is not Delta.update:
        return _spectrum(delta, most)
    return None


def _typed(
    delta: HardPromptDelta, layer: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[str, float]]]:
    ids = delta.tokens(layer).tolist()
    text = tokenizer.decode(ids)
    same = tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    about = f"the wording {text!r}" + ("" if same else ", whose tokens are others when it is typed")
    return about, [(str(tokenizer.decode([token])), 1.0) for token in ids]


def _words(
    rows: torch.Tensor, table: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[str, float]]]:
    likeness = nn.functional.normalize(rows, dim=1) @ nn.functional.normalize(table, dim=1).T
    best = likeness.topk(3, dim=1)
    words = [" ".join(str(tokenizer.decode([token])).strip() or "␣" for token in row) for row in best.indices.tolist()]
    return "the words nearest to each virtual token, by cosine", list(
        zip(words, best.values[:, 0].tolist(), strict=True)
    )


def _scales(delta: IA3Delta, most: int) -> tuple[str, list[tuple[str, float]]]:
    distances = (delta.scale - 1).abs()
    farthest = distances.topk(min(most, len(distances))).indices.tolist()
    what = "input" if delta.of_input else "output"
    about = f"the scales of the layer's {what} farthest from 1, less 1"
    return about, [(f"number {index}", float(delta.scale[index]) - 1) for index in farthest]


def _spectrum(delta: Delta, most: int) -> tuple[str, list[tuple[str, float]]]:
    values = torch.linalg.svdvals(delta.update())
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
    directions = int((shares < 0.9).sum()) + 1 if float(values[0]) else 0
    about = f"singular values of the update; {directions} hold 90 % of the square"
    return about, [(f"σ{index}", float(value)) for index, value in enumerate(values[:most], start=1)]
