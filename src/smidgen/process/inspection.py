"""What a careful person looks at before training: what repeats, what is rare, what is cut, what looks wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smidgen.process.data import Example
from smidgen.process.job import Job
from smidgen.process.mislabelled import LARGEST as MOST_LABELLED
from smidgen.process.mislabelled import doubtful
from smidgen.process.odd_text import damage, foreign
from smidgen.process.recipe import Task
from smidgen.process.similar import LARGEST as MOST_COMPARED
from smidgen.process.similar import nearly_equal
from smidgen.process.splits import normalize
from smidgen.process.words import counted, some

SPLITS = ("train", "validation", "test")

SHOWN = 20
"""Rows that a finding lists."""

FEW = 10
"""Training rows below which a label is rare."""

LONGEST_ROW = 1 << 20
"""Tokens; a row is not cut before it is measured."""

ANSWERS: dict[Task, str] = {"classification": "labels", "token-classification": "spans", "generation": "answers"}


class Found(NamedTuple):
    """A row of a finding: its split, its number there from 1, as `save_splits` has it, its text, and what about it."""

    split: str
    number: int
    text: str
    note: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a person should look at before training.

    Attributes:
        title: of a section.
        summary: what was found, in a sentence.
        rows: where, the clearest first; not all of them if there are many.
        more: how many rows are not among them.
    """

    title: str
    summary: str
    rows: list[Found] = dataclasses.field(default_factory=list)
    more: int = 0


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a split as they are written for the model; `most` is that of 95 rows in 100."""

    split: str
    median: int
    most: int
    longest: int
    cut: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was looked at, and what was found.

    Attributes:
        notes: what was done with the rows as they were read and split, in sentences.
        rows: of each split.
        labels: of each label its name, and its rows or spans in each split, the most frequent first.
        lengths: of each split.
        limit: the most tokens in a row, beside the technique's virtual ones.
        language: that of two thirds of the texts, as ISO 639 has it; None: it is not clear.
        findings: what to look at.
        good: what was looked for and not found, in sentences.
    """

    notes: list[str]
    rows: dict[str, int]
    labels: list[dict[str, Any]]
    lengths: list[Lengths]
    limit: int
    language: str | None
    findings: list[Finding]
    good: list[str]


def inspect_data(job: Job) -> Inspection:
    """Look at a recipe's data.

    Args:
        job: with the data in it.
    """
    look = Look(job)
    findings: list[Finding] = []
    good: list[str] = []
    for check in CHECKS:
        if look.task in check.tasks:
            found, limit = list(check.find(look)), look.limits.get(check.find, "")
            findings += [
                dataclasses.replace(
                    one, summary=one.summary + limit, rows=one.rows[:SHOWN], more=max(0, len(one.rows) - SHOWN)
                )
                for one in found
            ]
            good += [] if found else [check.fine + limit]
    return Inspection(
        notes=job.notes,
        rows={split: len(rows) for split, rows in look.splits.items()},
        labels=look.labels,
        lengths=_lengths(look),
        limit=job.room.row,
        language=look.language,
        findings=findings,
        good=good,
    )


class Look:
    """The rows, as the checks need them.

    Args:
        job: with the data in it.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.task = job, job.recipe.task
        self.splits: dict[str, list[Example]] = {split: getattr(job.data, split) for split in SPLITS}
        self.plain = {split: [normalize(row.text) for row in rows] for split, rows in self.splits.items()}
        backwards = list(self.splits.items())[::-1]  # where there are too many rows, some of training are passed over
        self.places = [(split, number) for split, rows in backwards for number in range(len(rows))]
        self.rows = [self.splits[split][number] for split, number in self.places]
        self.limits: dict[Callable[[Look], Iterator[Finding]], str] = {
            mislabelled: _first(MOST_LABELLED, len(self.rows)),
            similar: _first(MOST_COMPARED, max(map(len, self.splits.values()))),
        }
        self.language, self.strangers = foreign([row.text for row in self.rows])
        counts = {
            split: Counter(label for row in rows for label in self._of(row)) for split, rows in self.splits.items()
        }
        known = sorted(job.labels, key=lambda label: (-counts["train"][label], label))
        self.labels: list[dict[str, Any]] = [
            {"label": label, **{split: counts[split][label] for split in SPLITS}} for label in known
        ]

    def found(self, split: str, number: int, note: str = "") -> Found:
        """A row of a finding; `number` counts from 0."""
        return Found(split, number + 1, self.splits[split][number].text, note)

    def answer(self, row: Example) -> str:
        """A row's label, answer or spans as text."""
        if row.label is not None:
            return self.job.labels[row.label]
        return (
            row.answer if row.answer is not None else ", ".join(f"{s.label} {s.start}-{s.end}" for s in row.spans or ())
        )

    def _of(self, row: Example) -> Iterator[str]:
        if row.label is not None:
            yield self.job.labels[row.label]
        yield from (span.label for span in row.spans or ())


def shared(look: Look) -> Iterator[Finding]:
    """Texts that are in two splits."""
    for later, earlier in (("validation", "train"), ("test", "train"), ("test", "validation")):
        known = set(look.plain[earlier])
        rows = [number for number, text in enumerate(look.plain[later]) if text in known]
        if rows:
            yield Finding(
                "Texts in two splits",
                f"{_of(rows, look.plain[later])} of data.{later} with a text that data.{earlier} has as well: a score "
                "on them is no measure of new texts.",
                [look.found(later, row) for row in rows],
            )


def similar(look: Look) -> Iterator[Finding]:
    """Texts that are nearly the same as one to train on."""
    train, known = [row.text for row in look.splits["train"]], set(look.plain["train"])
    for split in ("validation", "test"):
        texts = [row.text for row in look.splits[split]]
        pairs = [pair for pair in nearly_equal(texts, train) if look.plain[split][pair.one] not in known]
        if pairs:
            yield Finding(
                "Nearly the same in two splits",
                f"{_of(pairs, texts[:MOST_COMPARED])} of data.{split} nearly the same as one of data.train: the score "
                "on them says less of new texts than that on the others.",
                [look.found(split, pair.one, f"in data.train: {train[pair.other]}") for pair in pairs],
            )


def repeated(look: Look) -> Iterator[Finding]:
    """Texts that are in their split several times."""
    for split, texts in look.plain.items():
        counts, first = Counter(texts), {text: number for number, text in reversed(list(enumerate(texts)))}
        rows = [look.found(split, first[text], f"{count} times") for text, count in counts.most_common() if count > 1]
        if rows:
            more = len(texts) - len(counts)
            yield Finding(
                "Repeated texts",
                f"{more:,} of the {len(texts):,} rows of data.{split} with the text of one before; they count as well.",
                rows,
            )


def contradicted(look: Look) -> Iterator[Finding]:
    """Texts that have several labels, answers or spans."""
    known: dict[str, dict[object, int]] = defaultdict(dict)
    for index, (split, number) in enumerate(look.places):
        known[look.plain[split][number]].setdefault(_meant(look, look.rows[index]), index)
    several = [list(answers.values()) for answers in known.values() if len(answers) > 1]
    if several:
        what = ANSWERS[look.task]
        answers = [[_short(look.answer(look.rows[index])) for index in own] for own in several]
        rows = [
            look.found(*look.places[min(own)], note=" / ".join(told))
            for own, told in zip(several, answers, strict=True)
        ]
        yield Finding(
            f"Different {what} of one text",
            f"{counted(several, 'text')} with different {what} in different rows.",
            rows,
        )


def _meant(look: Look, row: Example) -> object:
    """A row's label or answer, or its spans in its normalized text, where white space moves nothing."""
    if row.spans is None:
        return look.answer(row)
    ends = [[len(normalize(row.text[:place])) for place in (span.start, span.end)] for span in row.spans]
    return tuple((span.label, *own) for span, own in zip(row.spans, ends, strict=True))


def mislabelled(look: Look) -> Iterator[Finding]:
    """Labels that a classifier of words would not have given."""
    labels = [look.answer(row) for row in look.rows]
    doubts = doubtful([row.text for row in look.rows], labels)
    if doubts:
        yield Finding(
            "Labels that may be wrong",
            f"{_of(doubts, look.rows[:MOST_LABELLED])} with a label that a classifier of words doubts, which may be "
            "wrong itself: read the first, and mend those that are.",
            [
                look.found(*look.places[row], note=f"labelled {labels[row]}, looks like {label}")
                for row, label, _ in doubts
            ],
        )


def rare(look: Look) -> Iterator[Finding]:
    """Labels that have few rows to learn from, or none to be tested on."""
    few = [f"{label['label']} ({label['train']})" for label in reversed(look.labels) if label["train"] < FEW]
    absent = [label["label"] for label in look.labels if not label["test"]]
    unit = "spans" if look.task == "token-classification" else "rows"
    if few:
        yield Finding(
            "Rare labels", f"{counted(few, 'label')} with fewer than {FEW} {unit} to train on: {some(few, SHOWN)}."
        )
    if absent:
        yield Finding(
            "Labels without a test",
            f"{counted(absent, 'label')} not in data.test, so that no score says how they do: {some(absent, SHOWN)}.",
        )


def damaged(look: Look) -> Iterator[Finding]:
    """Texts with characters that do not belong there."""
    kinds: dict[str, list[Found]] = defaultdict(list)
    for (split, number), row in zip(look.places, look.rows, strict=True):
        if problem := damage(row.text):
            kinds[problem.partition(" (")[0]].append(look.found(split, number, problem))
    for kind, rows in kinds.items():
        yield Finding("Texts that look damaged", f"{_of(rows, look.rows)} with {kind}.", rows)


def strange(look: Look) -> Iterator[Finding]:
    """Texts in another language than most."""
    rows = [look.found(*look.places[index], note=f"looks like {code}") for index, code in look.strangers.items()]
    if rows:
        summary = f"{_of(rows, look.rows)} in what looks like another language than that of most ({look.language})."
        yield Finding("Other languages", summary, rows)


class Check(NamedTuple):
    """Something to look for, what to say if it is not found, and in which tasks."""

    find: Callable[[Look], Iterator[Finding]]
    fine: str
    tasks: tuple[Task, ...] = ("classification", "token-classification", "generation")


CHECKS = (
    Check(shared, "No text is in two splits."),
    Check(similar, "No text is nearly the same as one to train on."),
    Check(repeated, "No text is repeated in its split."),
    Check(contradicted, "No text has different answers in different rows."),
    Check(mislabelled, "No label looks wrong.", ("classification",)),
    Check(rare, "No label is rare, and each is tested.", ("classification", "token-classification")),
    Check(damaged, "No text looks damaged."),
    Check(strange, "No text is clearly in another language than most."),
)


def _lengths(look: Look) -> list[Lengths]:
    found = []
    for split, rows in look.splits.items():
        encoded, _ = look.job.encode(rows, max_length=LONGEST_ROW)
        tokens = np.array([len(row.input_ids) for row in encoded])
        middle, most = (int(np.percentile(tokens, share, method="higher")) for share in (50, 95))
        found.append(Lengths(split, middle, most, int(tokens.max()), int((tokens > look.job.room.row).sum())))
    return found


def _first(most: int, count: int) -> str:
    """What to add where not all rows were looked at."""
    return f" (The first {most:,} rows were looked at.)" if count > most else ""


def _of(some: Sequence[object], every: Sequence[object]) -> str:
    return f"{len(some):,} of the {len(every):,} rows"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
