"""Texts of two splits that are nearly the same: by the letters that they share, in threes to fives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LARGEST = 50_000
"""Texts of each side that are compared; of more, the first."""

AT_ONCE = 500


class Pair(NamedTuple):
    """A text of one side, the most similar one of the other, and the cosine of their letters."""

    one: int
    other: int
    likeness: float


def nearly_equal(texts: Sequence[str], others: Sequence[str], *, least: float = 0.9) -> list[Pair]:
    """For each text the most similar one of the others, if it is as similar as that; the most similar first.

    Args:
        texts: of one side.
        others: of the other.
        least: the least cosine between the TF-IDF vectors of their groups of three to five letters.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, others = texts[:LARGEST], others[:LARGEST]
    if not texts or not others:
        return []
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    try:
        both = vectorizer.fit_transform([*others, *texts])  # of both, or what is new in a text would not count
    except ValueError:  # no text has three letters
        return []
    theirs, ours = both[: len(others)], both[len(others) :]
    found = []
    for start in range(0, len(texts), AT_ONCE):
        likeness = (ours[start : start + AT_ONCE] @ theirs.T).tocsr()
        best = likeness.argmax(axis=1)
        for row, other in enumerate(best.A1 if hasattr(best, "A1") else best):
            value = float(likeness[row, other])
            if value >= least:
                found.append(Pair(start + row, int(other), value))
    return sorted(found, key=lambda pair: -pair.likeness)
