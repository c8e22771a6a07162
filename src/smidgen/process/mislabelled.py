"""Rows whose label is likely wrong: confident learning, Northcutt et al., 2021, arXiv:1911.00068, section 3.1.

A classifier of words that has not seen a row gives it a probability for each label. A label is claimed by a row that
has more of it than those that are labelled so have on average. A row that claims another label than its own, and more
of it than of any other, is likely to have the wrong one. The classifier is a logistic regression of words and pairs of
words, which takes seconds; where it is wrong itself, so is the claim: what is listed is to be read by a person.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FOLDS = 5
LARGEST = 30_000
"""Rows that are looked at; of more, the first."""

LARGEST_WEIGHTS = 1_000_000
"""Of the classifier, whose training has some twenty copies of them in memory."""


class Doubt(NamedTuple):
    """A row, the label that it seems to have, and by how much that is likelier than its own, from 0 to 1."""

    row: int
    label: str
    margin: float


def doubtful(texts: Sequence[str], labels: Sequence[str], *, seed: int = 0) -> list[Doubt]:
    """The rows whose label is likely wrong, the likeliest first.

    Args:
        texts: of the rows.
        labels: of the rows; those of a label with fewer than FOLDS rows are passed over.
        seed: of the parts that the rows are cut into.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    frequent = {label for label, count in Counter(labels[:LARGEST]).items() if count >= FOLDS}
    rows = [row for row, label in enumerate(labels[:LARGEST]) if label in frequent]
    if len(frequent) < 2:
        return []
    names, known = np.unique([labels[row] for row in rows], return_inverse=True)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    words = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=r"(?u)\b\w+\b",
        max_features=max(2000, LARGEST_WEIGHTS // len(names)),
    )
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=300))
    try:
        chances = cross_val_predict(classifier, [texts[row] for row in rows], known, cv=folds, method="predict_proba")
    except ValueError:  # no text has a word
        return []
    average = np.array([chances[known == label, label].mean() for label in range(len(names))])
    claims = np.where(chances >= average, chances, 0.0)
    claimed = claims.argmax(1)
    every = np.arange(len(rows))
    margins = np.where(claims.max(1) > 0, chances[every, claimed] - chances[every, known], 0.0)
    found = [
        Doubt(rows[index], str(names[claimed[index]]), float(margins[index])) for index in np.flatnonzero(margins > 0)
    ]
    return sorted(found, key=lambda doubt: -doubt.margin)
