"""How each technique looks: one label, one colour and one shape, the same in every table and chart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from smidgen.report.numbers import Metric
from smidgen.report.results import Comparison, Technique
from smidgen.report.svg import SHAPES

COLOURS = 12  # --c0 to --c11 in style.css


@dataclass(frozen=True)
class Entry:
    """A technique as it is shown.

    Args:
        technique: what it scored and cost.
        label: its title, numbered when two techniques share one.
        colour: the class of style.css that sets `--c`; the baseline has the text's own colour.
        shape: of its marker, below `SHAPES`; 12 colours and 5 shapes repeat together only after 60 techniques.
        id: unique in the page, and safe in an attribute or a selector.
        is_baseline: whether the others are measured against it.
    """

    technique: Technique
    label: str
    colour: str
    shape: int
    id: str
    is_baseline: bool


def within_sentence(label: str) -> str:
    """A label as it stands within a sentence: full fine-tuning, but LoRA and P-tuning as they are."""
    return label[:1].lower() + label[1:] if label.split(" ")[0][1:].islower() else label


def entries_of(comparison: Comparison) -> list[Entry]:
    """The techniques in the order of the comparison, each with its looks."""
    titles = [technique.title or technique.name or "Unnamed" for technique in comparison.techniques]
    shared, seen = Counter(titles), Counter[str]()
    entries: list[Entry] = []
    colour = 0
    for index, (technique, title) in enumerate(zip(comparison.techniques, titles, strict=True)):
        seen[title] += 1
        label = f"{title} ({seen[title]})" if shared[title] > 1 else title
        is_baseline = technique.name == comparison.baseline and not any(entry.is_baseline for entry in entries)
        entries.append(
            Entry(
                technique=technique,
                label=label,
                colour="base" if is_baseline else f"c{colour % COLOURS}",
                shape=0 if is_baseline else colour % SHAPES,
                id=f"t{index}",
                is_baseline=is_baseline,
            )
        )
        colour += not is_baseline
    return entries


def ranked(entries: list[Entry], metric: Metric) -> list[Entry]:
    """Best score first; those without a score last, in their own order."""
    scored = [entry for entry in entries if entry.technique.done and entry.technique.score is not None]
    best_first = sorted(
        scored, key=lambda entry: (-metric.good(entry.technique.score or 0), entry.technique.trained or 0)
    )
    return best_first + [entry for entry in entries if entry not in best_first]


def subject_of(comparison: Comparison, entries: list[Entry], metric: Metric) -> Entry | None:
    """What the page puts first: the recommended technique, else the best but for the baseline, else any."""
    done = [entry for entry in ranked(entries, metric) if entry.technique.done]
    recommended = [entry for entry in done if entry.technique.name == comparison.recommended]
    others = [entry for entry in done if not entry.is_baseline]
    return next(iter(recommended + others + done), None)
