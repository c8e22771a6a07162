"""The task's data: labelled examples in three splits, and what a user should know about them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smidgen.errors import UserError
from smidgen.process.problems import shown, unknown
from smidgen.process.recipe import TARGETS, DataConfig, Task
from smidgen.process.spans import Span, read_spans
from smidgen.process.splits import normalize, set_aside, together
from smidgen.process.tables import as_text, read_table
from smidgen.process.words import counted, some

Target = str | tuple[Span, ...]
"""A label, an answer, or labelled spans."""

LABELS_NAMED = 10
"""How many labels a note names."""


class Row(NamedTuple):
    """A row of a source: its text, what belongs to it, and the group that it may not be parted from, if it has one."""

    text: str
    target: Target
    group: str = ""


@dataclass(frozen=True)
class Example:
    """One row: its text, and the index of its label, its labelled spans or its answer, where they are known."""

    text: str
    label: int | None = None
    answer: str | None = None
    spans: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class TaskData:
    """The data of one run.

    Attributes:
        labels: of the rows, in the order of `Example.label`, or of their spans; none in generation.
        notes: what a user should know about the data, in sentences.
    """

    task: Task
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of every example in its order, to notice on resuming that a file changed."""
        digest = hashlib.sha256(json.dumps([self.task, self.labels]).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(f"\n{len(split)}".encode())
            for example in split:
                digest.update(json.dumps([example.text, example.label, example.answer, example.spans]).encode())
        return digest.hexdigest()


def load_data(config: DataConfig, task: Task) -> TaskData:
    """Reads the splits, and makes those that are not given from the training rows.

    A split that is made shares no text with another, is stratified by the rows' labels, and depends on `config.seed`
    and the rows alone, not on their order. In splits that are given, texts that training has as well, and those that
    occur several times, are counted and noted.

    Args:
        config: where the rows are.
        task: what their columns mean.

    Raises:
        UserError: a source is missing or unreadable, rows are bad, a split has a label that training lacks, there
            is only one class or no span, or there are too few rows to make a split of.
    """
    sources = {"train": config.train, "validation": config.validation, "test": config.test}
    splits: dict[str, list[Row]] = {}
    notes: list[str] = []
    for split, source in sources.items():
        if source is not None:
            splits[split], found = _read(source, config, task, field=f"data.{split}")
            notes += found
    labels = () if task == "generation" else _labels(splits, task)
    if task == "classification":
        notes += _conflicts(splits["train"])
    notes += _repeats(splits)
    notes += _overlaps(splits)
    notes += _make_splits(splits, config, task)
    notes += _draw(splits, config, task)
    examples = {split: _examples(rows, task, labels) for split, rows in splits.items()}
    return TaskData(task, examples["train"], examples["validation"], examples["test"], labels, tuple(notes))


def read_examples(
    source: str, config: DataConfig, task: Task, labels: Sequence[str]
) -> tuple[list[Example], tuple[str, ...]]:
    """Reads labelled rows from another source, to score a trained adapter on; and notes on rows that were left out.

    Args:
        source: as in a recipe.
        config: names the columns.
        task: what they mean.
        labels: those that the adapter knows.

    Raises:
        UserError: the source can't be read, or has a label that is not among `labels`.
    """
    ungrouped = config.model_copy(update={"group": None})  # nothing is split here
    rows, notes = _read(source, ungrouped, task, field="data")
    unseen = set() if task == "generation" else _labels_of(rows) - set(labels)
    if unseen:
        raise UserError(f"{source} has labels that the adapter was not trained on: {_listed(sorted(unseen))}.")
    return _examples(rows, task, labels), notes


def _read(source: str, config: DataConfig, task: Task, *, field: str) -> tuple[list[Row], tuple[str, ...]]:
    """The usable rows of a source, and notes on those that are not."""
    column = getattr(config, TARGETS[task])

    def convert(values: Sequence[object]) -> Row:
        text = as_text(values[0], config.text)
        group = as_text(values[2], config.group) if config.group else ""
        if task == "token-classification":
            return Row(text, read_spans(values[1], text), group)
        target = as_text(values[1], column)
        return Row(text, target.strip() if task == "classification" else target, group)

    columns, skip_bad = (config.text, column, *([config.group] if config.group else [])), config.bad_rows == "skip"
    rows, notes = read_table(source, columns, field=field, skip_bad=skip_bad, convert=convert)
    return [Row(*row) for row in rows], notes


def _examples(rows: Sequence[Row], task: Task, labels: Sequence[str]) -> list[Example]:
    number = {label: index for index, label in enumerate(labels)}
    return [
        Example(text, spans=target)
        if not isinstance(target, str)
        else Example(text, label=number[target])
        if task == "classification"
        else Example(text, answer=target)
        for text, target, _ in rows
    ]


def _labels_in(row: Row) -> tuple[str, ...]:
    """The labels of a row: its own, or those of its spans."""
    target = row.target
    return (target,) if isinstance(target, str) else tuple(span.label for span in target)


def _labels_of(rows: Sequence[Row]) -> set[str]:
    """The labels of all rows."""
    return {label for row in rows for label in _labels_in(row)}


def _labels(splits: Mapping[str, Sequence[Row]], task: Task) -> tuple[str, ...]:
    """The labels of the training rows: by number if all are whole numbers, otherwise by name."""
    labels = _labels_of(splits["train"])
    if not labels:
        raise UserError("No row of data.train has a span, so that there is nothing to learn.")
    if len(labels) == 1 and task == "classification":
        raise UserError(
            f"Every row of data.train has the label {labels.pop()!r}. Classification needs two labels at least."
        )
    for split, rows in splits.items():
        new = sorted(_labels_of(rows) - labels)
        if new:
            count = sum(not labels.issuperset(_labels_in(row)) for row in rows)
            raise UserError(
                f"data.{split} has labels that data.train lacks, in {count} of its {len(rows)} rows: {_listed(new)}."
                f"{unknown(new[0], sorted(labels))} Mend them, or add rows with them to data.train."
            )
    numbers = all(re.fullmatch("-?[0-9]+", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label) if numbers else 0, label)))


def _conflicts(rows: Sequence[Row]) -> list[str]:
    """A note on training texts that have several labels."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[normalize(row.text)].update(_labels_in(row))
    conflicting = {text: labels for text, labels in found.items() if len(labels) > 1}
    if not conflicting:
        return []
    text, labels = next(iter(conflicting.items()))
    return [
        f"data.train gives {counted(conflicting, 'text')} different labels in different rows, "
        f"such as {shown(text)}: {_listed(sorted(labels))}."
    ]


def _repeats(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Notes on texts that a given validation or test split holds several times."""
    notes = []
    for split in ("validation", "test"):
        rows = splits.get(split, ())
        repeated = len(rows) - len({normalize(row.text) for row in rows})
        if repeated:
            notes.append(
                f"{repeated} of the {len(rows)} rows of data.{split} repeat the text of an earlier one, which counts "
                "as often in the score."
            )
    return notes


def _overlaps(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Notes on texts that occur in two of the given splits."""
    texts = {split: [normalize(row.text) for row in rows] for split, rows in splits.items()}
    groups = {split: {row.group for row in rows} - {""} for split, rows in splits.items()}
    notes = []
    for later, earlier in (("validation", "train"), ("test", "train"), ("test", "validation")):
        notes += shared_texts(texts.get(later, []), texts.get(earlier, []), f"data.{later}", f"data.{earlier}")
        if both := groups.get(later, set()) & groups.get(earlier, set()):
            count = sum(row.group in both for row in splits[later])
            notes.append(
                f"{count} of the {len(splits[later])} rows of data.{later} belong to {counted(both, 'group')} of "
                f"data.{earlier} ({_listed(sorted(both))}): a score on them is no measure of new groups."
            )
    return notes


def shared_texts(texts: Sequence[str], others: Sequence[str], source: str, other: str) -> list[str]:
    """A note on the texts of a source, normalized, that another has as well."""
    known = set(others)
    count = sum(text in known for text in texts)
    if not count:
        return []
    return [
        f"{count} of the {len(texts)} rows of {source} have a text that {other} has as well: a score on them is no "
        "measure of new texts."
    ]


def _make_splits(splits: dict[str, list[Row]], config: DataConfig, task: Task) -> list[str]:
    """Moves training rows into the splits that are not there, and says so."""
    whole, before = len(splits["train"]), _labels_of(splits["train"])
    shares = {"test": config.test_share, "validation": config.validation_share}
    wanted = [split for split in shares if split not in splits]
    for split in wanted:
        train = splits["train"]
        given = [row for other, rows in splits.items() if other != "train" for row in rows]
        free = _apart(train, given, by_group=config.group is not None)
        share = min(1.0, shares[split] * whole / max(1, len(free)))  # of the rows that are left
        texts = [train[row].text for row in free]
        labels = [_strata(train[row], task) for row in free]
        groups = [train[row].group for row in free] if config.group else None
        chosen = {free[row] for row in set_aside(texts, labels, share, seed=config.seed, groups_of=groups)}
        if not chosen and task == "token-classification":  # each text has the last of some label: one of them goes
            alike = [("",) for _ in free]
            chosen = {free[row] for row in set_aside(texts, alike, share, seed=config.seed, groups_of=groups)}
        if not chosen:
            each = " of different groups" if config.group else ""
            each += " for any label" if task == "classification" else ""
            raise UserError(
                f"data.train has {whole} rows, and not two different texts{each} to set a {split} split aside from. "
                f"Add rows, or give a file as data.{split}."
            )
        splits[split] = [train[row] for row in sorted(chosen)]
        splits["train"] = [row for index, row in enumerate(train) if index not in chosen]
    if not wanted:
        return []
    group = " and no group" if config.group else ""
    sizes = " and ".join(f"data.{split} ({len(splits[split])} rows)" for split in wanted)
    notes = [f"Set aside from the {whole} rows of data.train, with no text{group} in two splits: {sizes}."]
    unmeasured = sorted(_labels_of(splits["train"]) - _labels_of(splits["test"]))
    if task != "generation" and "test" in wanted and unmeasured:
        notes.append(f"Too rare to be in the test split: {counted(unmeasured, 'label')} ({_listed(unmeasured)}).")
    return notes + _left_without(before, splits["train"], task)


def _left_without(labels: set[str], rows: Sequence[Row], task: Task) -> list[str]:
    """A note on labels that none of the rows that are left to train on has."""
    without = sorted(labels - _labels_of(rows)) if task != "generation" else []
    return [f"Left without a row to train on: {counted(without, 'label')} ({_listed(without)})."] if without else []


def _apart(train: Sequence[Row], given: Sequence[Row], *, by_group: bool) -> list[int]:
    """The training rows that share no text, and no group, with a row of another split, or with one that does."""
    rows = [*train, *given]
    tied = together([row.text for row in rows], [row.group for row in rows] if by_group else None)
    return sorted(row for own in tied.values() if max(own) < len(train) for row in own)


def _strata(row: Row, task: Task) -> tuple[str, ...]:
    """What a split takes its share of, and of what it leaves a text: a class; all rows, whatever spans they have."""
    if task == "classification":
        return _labels_in(row)
    return ("", *_labels_in(row)) if task == "token-classification" else ("",)


def _draw(splits: dict[str, list[Row]], config: DataConfig, task: Task) -> list[str]:
    """Leaves as many rows to train on as are wanted, and no more to validate on; those of fewer are among more."""
    if config.rows is None:
        return []
    whole, before = len(splits["train"]), _labels_of(splits["train"])
    if config.rows > whole:
        raise UserError(f"data.rows={config.rows} is more than the {whole} rows that there are to train on.")
    for split in ("train", "validation"):
        rows = splits[split]
        drawn = np.random.default_rng([config.draw, len(rows)]).permutation(len(rows))[: config.rows]
        splits[split] = [rows[row] for row in sorted(drawn)]
    kept = len(splits["validation"])
    notes = [f"Draw {config.draw} of {whole} training rows: {config.rows} to train on, {kept} to validate on."]
    return notes + _left_without(before, splits["train"], task)


def _listed(names: Sequence[str]) -> str:
    return some(list(map(repr, names)), LABELS_NAMED)
