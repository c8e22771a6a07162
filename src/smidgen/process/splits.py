"""Rows set aside for validation and test: by label, with no text on both sides, whatever the order of the file."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence


def normalize(text: str) -> str:
    """What two texts share if they are duplicates: case, white space and compatible characters do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def set_aside(
    texts: Sequence[str],
    labels: Sequence[Collection[str]],
    share: float,
    *,
    seed: int,
    groups_of: Sequence[str] | None = None,
) -> list[int]:
    """Chooses rows for another split.

    Rows of the same text (see `normalize`) stay together, and so do rows of the same group. Each label gives its share,
    to within a row or what stays together, but never its last text, so that training still sees every label; a label
    with a single text gives none. A row with several labels counts for the share of its first one, and takes the last
    text of none. Hashes of the seed and the texts decide, so the order of the rows does not matter.

    Args:
        texts: one for each row.
        labels: of each row, one at least; "" where there is none.
        share: of the rows whose labels have more than one text; at least one row is chosen if there are such.
        seed: of the hashes.
        groups_of: one for each row, such as a conversation or a person; None: there are none.

    Returns:
        The indices of the chosen rows, ascending; empty if each label has a single text.
    """
    groups = together(texts, groups_of)
    held = {text: {label for row in rows for label in labels[row]} for text, rows in groups.items()}
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


def together(texts: Sequence[str], groups_of: Sequence[str] | None = None) -> dict[str, list[int]]:
    """The rows that may not be parted, by the first of their normalized texts: they share a text, or a group."""
    kinds: dict[tuple[bool, str], int] = {}  # a text or a group, and the number of what it belongs to
    leaders: list[int] = []

    def leader(number: int) -> int:
        while leaders[number] != number:
            leaders[number] = leaders[leaders[number]]
            number = leaders[number]
        return number

    first: list[int] = []
    for row, text in enumerate(texts):
        keys = [(True, normalize(text))] + ([(False, groups_of[row])] if groups_of is not None else [])
        known = [leader(kinds[key]) for key in keys if key in kinds]
        if not known:
            known.append(len(leaders))
            leaders.append(len(leaders))
        for other in known[1:]:
            leaders[other] = known[0]
        kinds.update(dict.fromkeys(keys, known[0]))
        first.append(known[0])
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(first):
        rows.setdefault(leader(number), []).append(row)
    return {min(normalize(texts[row]) for row in own): own for own in rows.values()}


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=16).digest()
