"""Rows of text from a file, a package or the hub: every value stays as it was written, and each bad row is named."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smidgen.errors import UserError
from smidgen.files import unique
from smidgen.process.problems import unknown

if TYPE_CHECKING:
    import pyarrow

EMBEDDED = {"tweets": ("text", "label"), "questions": ("text", "answer")}
"""The data sets that need no hub, and their columns."""

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; csv's own limit of 131,072 is less than a long text."""

ROWS_NAMED = 5
"""How many bad rows of a kind a message names."""

Found = Iterator[tuple[int, Sequence[object] | str]]
"""A row's number and its raw values in the order of the wanted columns, or what is wrong with it."""

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
        return "row", _embedded(rest, columns, name)
    if kind == "hub":
        return "row", _hub(rest, columns, name, field.rpartition(".")[2])
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


def _require(columns: Iterable[str], there: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in there:
            raise UserError(f"{name} has no column {column!r}.{unknown(column, there)}")
        if there.count(column) > 1:
            raise UserError(f"{name} has {there.count(column)} columns {column!r}: rename all but one.")


def _csv(path: Path, columns: tuple[str, ...], name: str) -> Found:
    """RFC 4180: quoted fields may hold commas, line breaks and doubled quotes."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        yield from _delimited(csv.reader(lines, strict=True), columns, name)


def _tsv(path: Path, columns: tuple[str, ...], name: str) -> Found:
    """Quoted as CSV is, or, where that reading fails, with every quote a character like any other (as in GLUE)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        try:
            found = list(_delimited(csv.reader(lines, delimiter="\t", strict=True), columns, name))
        except _BrokenQuotes:
            lines.seek(0)
            found = list(_delimited(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), columns, name))
    yield from found


class _BrokenQuotes(UserError):
    pass


def _delimited(reader: Any, columns: tuple[str, ...], name: str) -> Found:
    """The records of a csv reader; blank lines are passed over."""
    csv.field_size_limit(LONGEST_FIELD)
    line = 1
    try:
        header: list[str] = next(reader, [])
        if any("\udc80" <= character <= "\udcff" for column in header for character in column):
            raise UserError(f"{name} is not UTF-8 text: its first line holds other bytes. Save it as UTF-8.")
        for separator in ",;\t":
            if len(header) == 1 and header[0] not in columns and separator in header[0]:
                raise UserError(f"{name} seems to separate its fields by {separator!r}, which its ending does not say.")
        _require(columns, header, name)
        places = [header.index(column) for column in columns]
        line = reader.line_num + 1
        for record in reader:
            if record and len(record) != len(header):
                yield line, f"{len(record)} fields, and the first line has {len(header)}"
            elif record:
                yield line, [record[place] for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        raise _BrokenQuotes(
            f"{name}, line {line}: {error}. A field with a comma, a quote or a line break belongs in quotes, "
            "and a quote in it is doubled."
        ) from error


def _jsonl(path: Path, columns: tuple[str, ...], name: str) -> Found:
    """One JSON object a line; blank lines are passed over."""
    there: dict[str, None] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
            except UnicodeDecodeError:
                yield number, "broken UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON ({getattr(error, 'msg', error)})"
            else:
                if isinstance(row, dict):
                    there |= dict.fromkeys(row)
                    yield number, [row.get(column) for column in columns]
                else:
                    yield number, "not an object in {...}"
    if there:
        _require(columns, list(there), name)


def _parquet(path: Path, columns: tuple[str, ...], name: str) -> Found:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _require(columns, file.schema_arrow.names, name)
        table = file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a whole Parquet file: {error}.") from error
    yield from _arrow(table, columns)


def _arrow(table: pyarrow.Table, columns: tuple[str, ...]) -> Found:
    """The rows of an Arrow table; the class numbers of a datasets.ClassLabel become its names."""
    import pyarrow

    features: dict[str, Any] = {}
    if b"huggingface" in (table.schema.metadata or {}):
        import datasets

        features = datasets.Features.from_arrow_schema(table.schema)
    values: list[list[Any]] = []
    for column in columns:
        data, names = table.column(column), getattr(features.get(column), "names", None)
        if pyarrow.types.is_dictionary(data.type):
            data = data.cast(data.type.value_type)
        if pyarrow.types.is_string(data.type) or pyarrow.types.is_large_string(data.type):
            data = data.cast(pyarrow.large_binary())  # broken UTF-8 then spoils its own row only
        listed = data.to_pylist()
        if names:
            listed = [names[value] if value is not None and 0 <= value < len(names) else None for value in listed]
        values.append(listed)
    yield from enumerate(zip(*values, strict=True), start=1)


def _embedded(dataset: str, columns: tuple[str, ...], name: str) -> Found:
    if dataset not in EMBEDDED:
        raise UserError(f"{name} is no embedded data set.{unknown(dataset, EMBEDDED)}")
    from smidgen import embedded

    there = EMBEDDED[dataset]
    _require(columns, there, name)
    for number, row in enumerate(getattr(embedded, dataset)(), start=1):
        yield number, [row[there.index(column)] for column in columns]


def _hub(address: str, columns: tuple[str, ...], name: str, split: str) -> Found:
    import datasets

    address, _, given = address.partition("@")
    split = given or split
    parts = address.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(f"{name} is not hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or either with @SPLIT.")
    try:
        splits = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    except Exception as error:  # the hub, the network, the disk and the data set's own format fail in their own ways
        raise UserError(
            f"{name} can't be loaded: {' '.join(str(error).split())} Check the name and the network, "
            "or download the data set and give its file."
        ) from error
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}. Write hub:{address}@SPLIT.{unknown(split, splits)}")
    _require(columns, splits[split].column_names, name)
    yield from _arrow(splits[split].select_columns(list(columns)).with_format("arrow")[:], columns)


FILES: dict[str, tuple[str, Callable[[Path, tuple[str, ...], str], Found]]] = {
    ".csv": ("line", _csv),
    ".tsv": ("line", _tsv),
    ".jsonl": ("line", _jsonl),
    ".parquet": ("row", _parquet),
}
"""Endings of files: what the numbers of their rows count, and what reads them."""
