"""Labelled spans of a text, and the tags of its tokens that stand for them (Ramshaw & Marcus, 1995, cmp-lg/9505040).

A tag is a number: 0 for a token in no span, 1 + 2k for the first token of a span with the k-th label, and 2 + 2k for
its other tokens; by name O, B-label and I-label.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from smidgen.files import unique
from smidgen.placeholders import IGNORED

EXAMPLE = '[{"start": 0, "end": 4, "label": "city"}]'
"""Spans as a row holds them."""


class Span(NamedTuple):
    """A part of a text: its characters from `start` up to, not including, `end`."""

    start: int
    end: int
    label: str


class Run(NamedTuple):
    """A span in tokens, from `first` to `last`, and the number of its label."""

    first: int
    last: int
    label: int


def read_spans(value: object, text: str) -> tuple[Span, ...]:
    """The spans of a row, by their starts.

    Args:
        value: a list of {"start": 4, "end": 9, "label": "city"}, or such a list as JSON text; other keys do not count.
        text: the row's.

    Returns:
        The spans, without white space at their ends.

    Raises:
        ValueError: it is no such list, or a span lies outside the text, holds none of it, or overlaps with another.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("no spans; a text without any has []")
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"spans is not JSON ({getattr(error, 'msg', error)}), such as {EXAMPLE}") from None
    if not isinstance(value, list):
        raise ValueError(f"spans is not a list such as {EXAMPLE}")
    spans = sorted(_span(entry, text) for entry in value)
    for first, second in itertools.pairwise(spans):
        if second.start < first.end:
            raise ValueError(f"two spans overlap at character {second.start}")
    return tuple(spans)


def _span(entry: Any, text: str) -> Span:
    if not isinstance(entry, dict):
        raise ValueError(f"the span {entry!r} is not an object in {{...}}")
    for name, kind, wanted in (
        ("start", int, "a whole number"),
        ("end", int, "a whole number"),
        ("label", str, "text"),
    ):
        if type(entry.get(name)) is not kind:
            has = f"the {name} {entry[name]!r}, which is not {wanted}" if name in entry else f"no {name}"
            raise ValueError(f"the span {entry!r} has {has}")
    start, end, label = (entry[name] for name in Span._fields)
    if not label.strip():
        raise ValueError(f"the span from {start} to {end} has an empty label")
    if not 0 <= start < end <= len(text):
        raise ValueError(f"a span from {start} to {end} does not lie in a text of {len(text)} characters")
    if not text[start:end].strip():
        raise ValueError(f"the span from {start} to {end} holds white space alone")
    if label != label.encode("utf-8", "ignore").decode():  # half a surrogate pair
        raise ValueError("broken UTF-8 in a label")
    return Span(*trimmed(text, start, end), label.strip())


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A part of a text without the white space at its ends; of white space alone, nothing: (n, n)."""
    held = text[start:end]
    start += len(held) - len(held.lstrip())
    return start, start + len(held.strip())


def tag_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The names of the tags for these labels, in the order of their numbers."""
    return ("O", *(f"{place}-{label}" for label in labels for place in "BI"))


def labels_of(names: Sequence[str]) -> tuple[str, ...]:
    """The labels that these names of tags are for."""
    return tuple(name.removeprefix("B-") for name in names[1::2])


def tags_of(spans: Sequence[Span], offsets: Sequence[tuple[int, int]], labels: Sequence[str]) -> list[int]:
    """The tags that stand for spans.

    A token belongs to the first span that it shares a character with.

    Args:
        spans: by their starts.
        offsets: which characters of the text each token stands for; none, (n, n), for a token of no text.
        labels: the known ones.

    Returns:
        A tag for each token; IGNORED for one of no text.
    """
    tags = []
    place, begun = 0, False  # the span that comes next, and whether it has a token
    for start, end in offsets:
        if start == end:
            tags.append(IGNORED)
            continue
        while place < len(spans) and spans[place].end <= start:
            place, begun = place + 1, False
        if place < len(spans) and spans[place].start < end:
            tags.append(1 + 2 * labels.index(spans[place].label) + begun)
            begun = True
        else:
            tags.append(0)
    return tags


def runs(tags: Sequence[int]) -> list[Run]:
    """The spans that tags stand for, in tokens; one that starts with an I-label counts as well, as in conlleval.

    Args:
        tags: of neighbouring tokens; IGNORED ones belong to no span.
    """
    found: list[Run] = []
    for place, tag in enumerate(tags):
        if tag <= 0:
            continue
        label = (tag - 1) // 2
        if tag % 2 == 0 and found and found[-1].last == place - 1 and found[-1].label == label:
            found[-1] = found[-1]._replace(last=place)
        else:
            found.append(Run(place, place, label))
    return found


def spans_of(tags: Sequence[int], offsets: Sequence[tuple[int, int]], labels: Sequence[str]) -> tuple[Span, ...]:
    """The spans that tags stand for, in characters.

    Args:
        tags: of a row's tokens; more, in the padding, do not count.
        offsets: which characters of the text each token stands for; none, (n, n): its tag does not count.
        labels: the names of the labels.
    """
    of_text = [(tag, place) for tag, place in zip(tags, offsets, strict=False) if place[0] < place[1]]
    return tuple(
        Span(of_text[run.first][1][0], of_text[run.last][1][1], labels[run.label])
        for run in runs([tag for tag, _ in of_text])
    )
