"""Rows of text from a file, a package or the hub: every value stays as it was written, and each bad row is named."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smidgen.errors import UserError
from smidgen.process.problems import unknown
from smidgen.process.sources import FILES, Found, embedded_rows, hub_rows

ROWS_NAMED = 5
"""How many bad rows of a kind a message names."""

Convert = Callable[[Sequence[object]], tuple[Any, ...]]
"""Makes a row of the raw values of the wanted columns."""


class Table(NamedTuple):
    """The usable rows of one source.

    Attributes:
        rows: one text for each wanted column, unless they were converted.
        notes: what a user should know about the rows that are not there.
    """

    rows: list[tuple[Any, ...]]
    notes: tuple[str, ...]


class BadRow(NamedTuple):
    """A row that can't be used.

    Attributes:
        unit: what its number counts, "line" or "row".
        number: where it is, from 1.
        problem: what is wrong with it.
    """

    unit: str
    number: int
    problem: str

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.problem}"


def read_table(
    source: str,
    columns: Sequence[str],
    *,
    field: str,
    skip_bad: bool = False,
    convert: Convert | None = None,
) -> Table:
    """Reads the wanted columns of a source as text.

    Numbers and booleans of JSON lines and Parquet become text as well (1 and 1.0 are "1"), so that a label is the
    same in every kind of file. A row that misses a value, has an empty one, broken UTF-8, or the wrong number of
    fields is bad.

    Args:
        source: a .csv, .tsv, .jsonl or .parquet file; embedded:tweets or embedded:questions;
            hub:OWNER/NAME[/CONFIG][@SPLIT].
        columns: the names of the wanted columns.
        field: the recipe's field that names the source, for messages; its last word is the hub's split by default.
        skip_bad: whether bad rows are left out and noted.
        convert: makes a row of its raw values, and says by a ValueError why it is bad; default: each value as text.

    Raises:
        UserError: there is no such source, it is empty or can't be read, a column is not there, or rows are bad.
    """
    name = f"{field}={source!r}"
    rows: list[tuple[Any, ...]] = []
    bad: dict[str, list[int]] = defaultdict(list)
    unit = ""
    for row in stream_table(source, columns, field=field, convert=convert):
        if isinstance(row, BadRow):
            unit = row.unit
            bad[row.problem].append(row.number)
        else:
            rows.append(row)
    wrong = sum(map(len, bad.values()))
    if not wrong:
        if not rows:
            raise UserError(f"{name} has no rows.")
        return Table(rows, ())
    kinds = [f"{_named(numbers, unit)}: {problem}" for problem, numbers in bad.items()]
    said = f"{name}: {wrong} of {wrong + len(rows)} rows can't be used ({'; '.join(kinds)})"
    if not skip_bad:
        raise UserError(f"{said}. Mend them, or set data.bad_rows=skip to leave them out.")
    if not rows:
        raise UserError(f"{said}, so none is left.")
    return Table(rows, (f"{said}; they were left out.",))


def stream_table(
    source: str,
    columns: Sequence[str],
    *,
    field: str,
    convert: Convert | None = None,
) -> Iterator[tuple[Any, ...] | BadRow]:
    """Reads what `read_table` does one row after the other, bad ones as what is wrong with them.

    CSV and JSON lines are never in memory as a whole.

    Raises:
        UserError: there is no such source, it can't be read, or a column is not there.
    """
    name = f"{field}={source!r}"
    convert = convert or (lambda values: tuple(map(as_text, values, columns)))
    try:
        unit, found = _open(source, tuple(columns), name, field)
        for number, values in found:
            if isinstance(values, str):
                yield BadRow(unit, number, values)
                continue
            try:
                yield convert(values)
            except ValueError as error:
                yield BadRow(unit, number, str(error))
    except OSError as error:
        raise UserError(f"{name} can't be read: {error}.") from error


def _open(source: str, columns: tuple[str, ...], name: str, field: str) -> tuple[str, Found]:
    """What the numbers of a source's rows count ("line" or "row"), and its rows."""
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        return "row", embedded_rows(rest, columns, name)
    if kind == "hub":
        return "row", hub_rows(rest, columns, name, field.rpartition(".")[2])
    path = Path(source)
    _check_file(path, name)
    ending = path.suffix.lower()
    if ending not in FILES:
        raise UserError(f"{name} ends in {ending!r}. Known: {', '.join(FILES)}, embedded:NAME and hub:OWNER/NAME.")
    unit, reader = FILES[ending]
    return unit, reader(path, columns, name)


def _check_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise UserError(f"{name} is a folder. Give a file in it.")
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: there is no such file.{unknown(path.name, near) if near else ''}")
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")


def as_text(value: object, column: str) -> str:
    """A value of a column as text; a ValueError says why it is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap is stored as floats
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"no {column}")
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{column} is a {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a byte that surrogateescape let through
            raise ValueError(f"broken UTF-8 in {column}") from None
    if not value.strip():
        raise ValueError(f"empty {column}")
    return value


def _named(numbers: list[int], unit: str) -> str:
    """In words: "lines 4, 9, 30, 41, 52 and 7 more"."""
    first = ", ".join(map(str, numbers[:ROWS_NAMED]))
    more = f" and {len(numbers) - ROWS_NAMED:,} more" if len(numbers) > ROWS_NAMED else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {first}{more}"
