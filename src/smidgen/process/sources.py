"""What reads each kind of source: the numbers of its rows, and their raw values in the order of the wanted columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from smidgen.errors import UserError
from smidgen.files import unique
from smidgen.process.problems import unknown

if TYPE_CHECKING:
    import pyarrow

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; csv's own limit of 131,072 is less than a long text."""

EMBEDDED = {"tweets": ("text", "label"), "questions": ("text", "answer")}
"""The data sets that need no hub, and their columns."""

Found = Iterator[tuple[int, Sequence[object] | str]]
"""A row's number and its raw values in the order of the wanted columns, or what is wrong with it."""


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
    """Quoted as CSV is, or, where that is no reading, with every quote a character like any other (as in GLUE)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        how: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if _is_unquoted(lines) else {"strict": True}
        lines.seek(0)
        yield from _delimited(csv.reader(lines, delimiter="\t", **how), columns, name)


def _is_unquoted(lines: IO[str]) -> bool:
    """Whether to read quotes as such fails, or joins fields or lines that are whole records by themselves.

    Of a single column any line is one, so that it says nothing.
    """
    csv.field_size_limit(LONGEST_FIELD)
    try:
        records = csv.reader(lines, delimiter="\t", strict=True)
        if not any("\t" in field or "\n" in field for record in records for field in record):
            return False
    except csv.Error:
        return True
    lines.seek(0)
    plain = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    widths = {len(record) for record in plain if record}
    return len(widths) == 1 and widths != {1}


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
                raise UserError(
                    f"{name} seems to separate its fields by {separator!r}, which its ending does not say. "
                    "Save it with commas as .csv, or with tabs as .tsv."
                )
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
        raise UserError(
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
        raise UserError(f"{name} is not a whole Parquet file: {str(error).rstrip('.')}.") from error
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


def embedded_rows(dataset: str, columns: tuple[str, ...], name: str) -> Found:
    """The rows of a data set that a package ships."""
    if dataset not in EMBEDDED:
        raise UserError(f"{name} is no embedded data set.{unknown(dataset, EMBEDDED)}")
    from smidgen import embedded

    there = EMBEDDED[dataset]
    _require(columns, there, name)
    for number, row in enumerate(getattr(embedded, dataset)(), start=1):
        yield number, [row[there.index(column)] for column in columns]


def hub_rows(address: str, columns: tuple[str, ...], name: str, split: str) -> Found:
    """The rows of a split of a data set on the hub."""
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
