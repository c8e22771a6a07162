"""Rows set aside for validation and test: by label, with no text on both sides, whatever the order of the file."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence


def normalize(text: str) -> str:
    """What two texts share if they are duplicates: case, white space and compatible characters do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def set_aside(texts: Sequence[str], labels: Sequence[str], share: float, *, seed: int) -> list[int]:
    """Chooses rows for another split.

    Rows of the same text (see `normalize`) stay together. Each label gives its share, to within a row or a group of
    equal texts, but never its last text, so that training still sees every label; a label with a single text gives
    none. Hashes of the seed and the texts decide, so the order of the rows does not matter.

    Args:
        texts: one for each row.
        labels: one for each row; all the same where there are none.
        share: of the rows whose labels have more than one text; at least one row is chosen if there are such.
        seed: of the hashes.

    Returns:
        The indices of the chosen rows, ascending; empty if each label has a single text.
    """
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(normalize(text), []).append(row)
    held = {text: {labels[row] for row in rows} for text, rows in groups.items()}
    left = Counter(label for group in held.values() for label in group)
    candidates = sorted(
        (text for text in groups if all(left[label] > 1 for label in held[text])),
        key=lambda text: (_hash(seed, min(held[text])), _hash(seed, text)),
    )
    chosen: list[int] = []
    due = 0.0  # rows that the share asks for and that are not chosen yet; carried from label to label
    for text in candidates:
        size = len(groups[text])
        due += share * size
        if 2 * due >= size and all(left[label] > 1 for label in held[text]):
            chosen += groups[text]
            due -= size
            left.subtract(held[text])
    if candidates and not chosen:
        chosen = groups[min(candidates, key=lambda text: len(groups[text]))]
    return sorted(chosen)


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=16).digest()
