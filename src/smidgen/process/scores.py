"""Scores of answers against the truth: of classes, spans and texts, and of the probabilities that stand behind them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smidgen.process.spans import Span

Scores = dict[str, Any]

LARGEST_EXPONENT = 700.0
"""A perplexity beyond e^700 is no number; such a model has learned nothing."""

BINS = 15
"""Of probabilities, in the expected calibration error."""


def perplexity(loss: float) -> float:
    """E to the power of a token's loss."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def calibration(chances: NDArray[np.float32], targets: NDArray[np.int64]) -> Scores:
    """Whether the probabilities of classes are what they say.

    Args:
        chances: (rows, classes).
        targets: the true classes, (rows,).

    Returns:
        brier: the mean square of probabilities less the truth, summed over the classes (Brier, 1950). ece: the expected
        calibration error over 15 bins of the most likely class's probability (Guo et al., 2017, arXiv:1706.04599).
        calibration: of each bin that has rows their number, the mean probability and the accuracy.
    """
    rows = np.arange(len(targets))
    squares = (chances.astype(np.float64) ** 2).sum(1) - 2 * chances[rows, targets] + 1
    confidence, right = chances.max(1), chances.argmax(1) == targets
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = [
        {"rows": int(own.sum()), "confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean())}
        for own in (bins == number for number in range(BINS))
        if own.any()
    ]
    error = sum(entry["rows"] * abs(entry["accuracy"] - entry["confidence"]) for entry in table) / len(targets)
    return {"brier": float(squares.mean()), "ece": error, "calibration": table}


def exact_match(given: Sequence[str], answers: Sequence[str]) -> float:
    """The share of rows whose given answer is the expected one, spaces at its ends aside."""
    return sum(text == answer.strip() for text, answer in zip(given, answers, strict=True)) / len(answers)


class _Words:
    """Words of any alphabet, where Google's own knows a to z; of scripts without spaces each character."""

    alone = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")

    def tokenize(self, text: str) -> list[str]:
        """The words, in small letters, with the marks that belong to them, such as the vowels of Hindi."""
        found: list[str] = []
        goes_on = False
        for letter in unicodedata.normalize("NFC", text.lower()):
            is_alone = self.alone.match(letter) is not None
            if is_alone or letter.isalnum() or letter == "_" or unicodedata.category(letter)[0] == "M":
                if goes_on and not is_alone:
                    found[-1] += letter
                else:
                    found.append(letter)
                goes_on = not is_alone
            else:
                goes_on = False
        return found


def rouge(given: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """The means of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) as F measures, without stemming, by Google's package."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), tokenizer=_Words())
    scored = [scorer.score(answer, text) for text, answer in zip(given, answers, strict=True)]
    return {name: math.fsum(row[theirs].fmeasure for row in scored) / len(scored) for name, theirs in names.items()}


def span_scores(found: Sequence[Sequence[Span]], known: Sequence[Sequence[Span]], labels: Sequence[str]) -> Scores:
    """Scores of the spans found in each row against the true ones."""
    number = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), 3), dtype=int)  # of each label: right spans, found ones, true ones
    row_hits, row_spans = [], []
    for given, true in zip(map(set, found), map(set, known), strict=True):
        for column, spans in enumerate((given & true, given, true)):
            for span in spans:
                counts[number[span.label], column] += 1
        row_hits.append(len(given & true))
        row_spans.append(len(given) + len(true))
    per_class = [_class_score(label, _shares(*own), own[2]) for label, own in zip(labels, counts.tolist(), strict=True)]
    return _shares(*counts.sum(axis=0).tolist()) | {
        "macro_f1": float(np.mean([entry["f1"] for entry in per_class if entry["support"]] or [0.0])),
        "per_class": per_class,
        "row_hits": row_hits,
        "row_spans": row_spans,
    }


def _shares(right: int, found: int, true: int) -> dict[str, float]:
    return {
        "precision": right / max(1, found),
        "recall": right / max(1, true),
        "f1": 2 * right / max(1, found + true),
    }


def _class_score(label: str, shares: dict[str, float], support: int) -> Scores:
    """A class's row in the table; one that is not among the rows has no scores."""
    return {"label": label, **(shares if support else dict.fromkeys(shares)), "support": support}


def class_scores(found: Sequence[int], targets: Sequence[int], labels: Sequence[str]) -> Scores:
    """Scores of the classes found against the true ones, which are numbers of `labels`."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(labels)))
    precision, recall, f1, support = precision_recall_fscore_support(targets, found, labels=classes, zero_division=0.0)
    return {
        "accuracy": sum(map(int.__eq__, found, targets)) / len(targets),
        "macro_f1": float(f1[support > 0].mean()),  # a class that no row has says nothing about the model
        "per_class": [
            _class_score(label, {"precision": float(p), "recall": float(r), "f1": float(f)}, int(rows))
            for label, p, r, f, rows in zip(labels, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(targets, found, labels=classes).tolist(),
        "predictions": list(found),
        "targets": list(targets),
    }
