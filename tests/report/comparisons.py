"""Comparisons of any size to draw, with the fields of compare.json."""

from __future__ import annotations

from typing import Any

TITLES = ("Full fine-tuning", "Head only", "LoRA", "Houlsby adapter", "Pfeiffer adapter", "Parallel adapter")


def comparison(techniques: int = 3, classes: int = 2, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    """A comparison of so many techniques, the first one the baseline; without classes it has no confusion matrix."""
    labels = [f"class_{index}" for index in range(classes)]
    result = {
        "version": 1,
        "title": "Tweets",
        "created": "2026-11-23T08:44:00+00:00",
        "command": "smidgen compare recipe.yaml",
        "recipe": "model: embedded:minilm\ntechnique: lora\n",
        "task": "classification" if classes else "generation",
        "metric": metric,
        "model": {"id": "embedded:minilm", "parameters": 22713216},
        "data": {
            "name": "embedded:tweets",
            "train": 2000,
            "validation": 300,
            "test": 300,
            "labels": labels,
            "notes": ["12 texts stood there twice."],
        },
        "baseline": "technique-0",
        "recommended": "technique-2",
        "advice": "Use LoRA: it scores like full fine-tuning and trains 1.3 % of its parameters.",
        "seeds": [0],
        "environment": {"python": "3.11.7", "smidgen": "0.1.0", "cpu": "EPYC", "cores": 2},
        "techniques": [technique(index, labels, metric) for index in range(techniques)],
    }
    return result | changes


def technique(index: int, labels: list[str], metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    """The technique with that index: the higher, the lower its score and its costs."""
    score = 0.866 - 0.004 * index
    confusion = [[40 if i == j else int((i * 7 + j) % 11 == 0) for j in range(len(labels))] for i in range(len(labels))]
    result = {
        "name": f"technique-{index}",
        "title": TITLES[index] if index < len(TITLES) else f"Technique number {index}",
        "summary": "rank 8, alpha 16, all-linear, learning rate 0.001",
        "status": "done",
        "error": None,
        "score": score,
        "low": score - 0.03,
        "high": score + 0.03,
        "difference": -0.004 * index if index else None,
        "difference_low": -0.004 * index - 0.02 if index else None,
        "difference_high": -0.004 * index + 0.016 if index else None,
        "scores": [score],
        "macro_f1": score - 0.01,
        "trained": 22713216 >> index,
        "share": 1 / 2**index,
        "seconds": 100.0 - 5 * index,
        "tokens_per_second": 5300.0,
        "peak_memory_bytes": 900_000_000,
        "disk_bytes": 90_000_000 >> index,
        "curve": [
            {
                "epoch": epoch,
                "step": 60 * epoch,
                "seconds": 12.0 * epoch,
                "train_loss": 0.5 / epoch,
                "validation_loss": 0.4 / epoch,
                "validation_score": score - 0.1 / epoch,
            }
            for epoch in (1, 2, 3)
        ],
        "confusion": confusion or None,
        "per_class": [
            {"label": label, "precision": 0.9, "recall": 0.8, "f1": 0.5 + 0.001 * place, "support": 40}
            for place, label in enumerate(labels)
        ]
        or None,
    }
    return result | changes


def failed(index: int, error: str = "not enough memory") -> dict[str, Any]:
    """A technique that failed: every number is None."""
    whole = technique(index, [])
    return (
        dict.fromkeys(whole)
        | {key: whole[key] for key in ("name", "title", "summary")}
        | {
            "status": "failed",
            "error": error,
            "scores": [],
            "curve": [],
        }
    )
