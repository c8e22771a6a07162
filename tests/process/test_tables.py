from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from smidgen.errors import UserError
from smidgen.process.tables import Table, read_table, stream_table

COLUMNS = ("text", "label")


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(source: str, skip_bad: bool = False) -> Table:
    return read_table(source, COLUMNS, field="data.train", skip_bad=skip_bad)


def refusal(source: str) -> str:
    with pytest.raises(UserError) as error:
        read(source)
    return str(error.value)


def write_rows(folder: Path, ending: str, rows: list[tuple[str, str]]) -> str:
    path = folder / f"rows{ending}"
    if ending in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if ending == ".csv" else "\t")
            writer.writerows([COLUMNS, *rows])
    elif ending == ".jsonl":
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}), path)
    return str(path)


ENDINGS = [".csv", ".tsv", ".jsonl", ".parquet"]
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("ending", ENDINGS)
@given(rows=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=5))
def test_every_text_survives_every_kind_of_file(ending, rows, tmp_path_factory):
    assert read(write_rows(tmp_path_factory.mktemp("rows"), ending, rows)).rows == rows


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_taken_for_a_number_or_for_a_missing_value(ending, tmp_path):
    rows = [("NA", "007"), ("null", "1.0"), ("nan", "None"), ("1e3", "true"), (" x ", " 1"), ('"', "'")]
    assert read(write_rows(tmp_path, ending, rows)).rows == rows


def test_a_label_is_the_same_text_in_every_kind_of_file(tmp_path):
    numbers = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array([1, None], pyarrow.float64())})
    parquet.write_table(numbers, tmp_path / "a.parquet")
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n{"text": "c", "label": 1.0}\n'
    found = [
        *read(write(tmp_path, "a.csv", "text,label\na,1\n")).rows,
        *read(write(tmp_path, "a.jsonl", lines)).rows,
        *read(str(tmp_path / "a.parquet"), skip_bad=True).rows,
    ]
    assert {label for _, label in found} == {"1"}
    assert len(found) == 5


def test_a_byte_order_mark_line_ends_and_quoted_line_breaks_do_not_matter(tmp_path):
    content = '\ufefftext,label\r\n"two\nlines, ""quoted""",x\r\n\r\nplain,y\r\n'
    assert read(write(tmp_path, "a.csv", content)).rows == [('two\nlines, "quoted"', "x"), ("plain", "y")]
    lines = '\ufeff{"text": "a", "label": "b"}\r\n\r\n{"text": "c\\u2028d", "label": "e"}'
    assert read(write(tmp_path, "a.jsonl", lines)).rows == [("a", "b"), ("c\u2028d", "e")]


def test_columns_may_come_in_any_order_among_others(tmp_path):
    assert read(write(tmp_path, "a.CSV", "id,label,text\n1,x,a\n")).rows == [("a", "x")]


def test_quotes_in_a_tsv_that_are_no_quoting_are_characters(tmp_path):
    assert read(write(tmp_path, "a.tsv", 'text\tlabel\n"so" he said\tx\na\ty\n')).rows == [
        ('"so" he said', "x"),
        ("a", "y"),
    ]


def test_quotes_in_a_tsv_that_would_join_whole_records_are_characters(tmp_path):
    lines = 'text\tlabel\n"so good\tpos\nso bad"\tneg\nfine\tpos\n'
    assert read(write(tmp_path, "a.tsv", lines)).rows == [('"so good', "pos"), ('so bad"', "neg"), ("fine", "pos")]
    quoted = 'text\tlabel\n"two\nlines"\tpos\n"a\ttab"\tneg\n'
    assert read(write(tmp_path, "b.tsv", quoted)).rows == [("two\nlines", "pos"), ("a\ttab", "neg")]
    alone = write(tmp_path, "c.tsv", 'text\n"two\nlines"\nfine\n')
    assert [row[0] for row in stream_table(str(alone), ("text",), field="rows")] == ["two\nlines", "fine"]


def test_class_numbers_of_a_datasets_file_become_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    table = read(str(tmp_path / "a.parquet"), skip_bad=True)
    assert table.rows == [("a", "yes"), ("b", "no")]
    assert "row 3: no label" in table.notes[0]


def test_labels_stored_as_a_dictionary_are_read(tmp_path):
    labels = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": labels}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")).rows == [("a", "x"), ("b", "y"), ("c", "x")]


BAD = b'text,label\nok,a\n,a\n  ,a\ncaf\xe9,a\nok,\n"two\nlines",a,b\nok\nfine,b\n'


def test_bad_rows_are_counted_and_named_by_their_line(tmp_path):
    message = refusal(write(tmp_path, "a.csv", BAD))
    assert message.endswith(
        "6 of 8 rows can't be used (lines 3, 4: empty text; line 5: broken UTF-8 in text; line 6: empty label; "
        "line 7: 3 fields, and the first line has 2; line 9: 1 fields, and the first line has 2). "
        "Mend them, or set data.bad_rows=skip to leave them out."
    )


def test_bad_rows_are_left_out_only_when_asked_and_then_noted(tmp_path):
    table = read(write(tmp_path, "a.csv", BAD), skip_bad=True)
    assert table.rows == [("ok", "a"), ("fine", "b")]
    (note,) = table.notes
    assert "6 of 8 rows can't be used (lines 3, 4: empty text" in note
    assert note.endswith("they were left out.")


def test_only_the_first_of_many_bad_rows_are_named(tmp_path):
    message = refusal(write(tmp_path, "a.csv", "text,label\n" + ",x\n" * 1234 + "a,x\n"))
    assert "1234 of 1235 rows can't be used (lines 2, 3, 4, 5, 6 and 1,229 more: empty text)" in message


def test_each_kind_of_bad_json_line_is_named(tmp_path):
    lines = [
        *(b'{"text": "a", "label": "b"}', b"{oops", b"[1]", b'{"text": "a"}', b'{"text": null, "label": 1}'),
        *(b'{"text": ["a"], "label": 1}', b'{"text": "\xff", "label": 1}', b'{"text": "\\ud800", "label": 1}'),
        *(b'{"text": "a", "label": NaN}', b"[" * 100_000, b'{"text": "a", "label": ' + b"1" * 5000 + b"}"),
        b'{"text": "a", "label": "b", "label": "c"}',
    ]
    message = refusal(write(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert "11 of 12 rows" in message
    assert "line 12: not JSON (the key 'label' appears twice)" in message
    for said in [
        *("line 2: not JSON (Expecting property name", "line 3: not an object in {...}", "lines 4, 9: no label"),
        *(
            "line 5: no text",
            "line 6: text is a list, not text",
            "line 7: broken UTF-8",
            "line 8: broken UTF-8 in text",
        ),
        *("line 10: not JSON (maximum recursion", "line 11: not JSON (Exceeds the limit"),
    ]:
        assert said in message


def test_broken_utf8_in_parquet_spoils_its_row_only(tmp_path):
    raw = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw, "label": ["a", "b"]}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"), skip_bad=True).rows == [("fine", "a")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "texts,label\na,b\n", "has no column 'text'. Did you mean 'texts'? Known: texts, label."),
        ("a.tsv", "text\tclass\na\tb\n", "has no column 'label'. Known: text, class."),
        ("a.jsonl", '{"text": "a", "lable": 1}', "has no column 'label'. Did you mean 'lable'? Known: text, lable."),
        ("a.csv", "text,label,text\na,b,c\n", "has 2 columns 'text'"),
        ("a.csv", "text;label\na;b\n", "seems to separate its fields by ';'"),
        ("a.tsv", "text,label\na,b\n", "seems to separate its fields by ','"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "is not UTF-8 text"),
        ("a.csv", 'text,label\nx,y\n"a" b,c\n', "line 3: ',' expected after '\"'"),
        ("a.csv", 'text,label\nx,y\n"a,c\nd,e\n', "line 3: unexpected end of data"),
        ("a.parquet", "PAR1 but not really", "is not a whole Parquet file"),
        ("a.json", "{}", "ends in '.json'. Known: .csv, .tsv, .jsonl, .parquet, embedded:NAME and hub:OWNER/NAME."),
        ("a", "x", "ends in ''."),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path, name, content, said):
    source = write(tmp_path, name, content)
    message = refusal(source)
    assert said in message
    assert message.startswith(f"data.train={source!r}")


def test_a_parquet_file_that_was_cut_short_or_lacks_a_column_is_refused(tmp_path):
    whole = Path(write_rows(tmp_path, ".parquet", [("a", "b")] * 100))
    cut = write(tmp_path, "cut.parquet", whole.read_bytes()[:-30])
    assert "is not a whole Parquet file" in refusal(cut)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "narrow.parquet")
    assert "has no column 'label'. Known: text." in refusal(str(tmp_path / "narrow.parquet"))


def test_a_missing_file_names_the_nearest_and_a_folder_is_refused(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,b\n")
    assert "there is no such file. Did you mean 'train.csv'?" in refusal(str(tmp_path / "trian.csv"))
    assert "there is no such file." in refusal(str(tmp_path / "nowhere" / "train.csv"))
    assert "is a folder. Give a file in it." in refusal(str(tmp_path))


def test_rows_that_are_all_bad_are_refused_even_when_bad_rows_are_skipped(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 rows can't be used .*, so none is left\."):
        read(write(tmp_path, "a.csv", "text,label\n,a\n,b\n"), skip_bad=True)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("smidgen.embedded")
    module.tweets = lambda: [("fine", "positive"), ("bad", "negative")]  # type: ignore[attr-defined]
    module.questions = lambda: [("Why?", "Because.")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smidgen.embedded", module)
    monkeypatch.setattr("smidgen.embedded", module, raising=False)


@pytest.mark.usefixtures("embedded")
def test_embedded_data_has_columns_like_a_file():
    assert read("embedded:tweets").rows == [("fine", "positive"), ("bad", "negative")]
    assert read_table("embedded:questions", ("text", "answer"), field="data.train").rows == [("Why?", "Because.")]
    assert "has no column 'label'. Known: text, answer." in refusal("embedded:questions")
    assert "is no embedded data set. Did you mean 'tweets'?" in refusal("embedded:tweet")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A hub with two splits; the list holds what was asked of it."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"]), "text": datasets.Value("string")})
    splits = {
        name: datasets.Dataset.from_dict({"label": [1, 0], "text": [f"{name} a", f"{name} b"]}, features=features)
        for name in ("train", "test")
    }
    asked: list[tuple[str, ...]] = []

    def load_dataset(*address: str) -> datasets.DatasetDict:
        asked.append(address)
        if address[0] == "owner/missing":
            raise ConnectionError("no route to\n the hub")
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_is_read_with_the_names_of_its_labels(hub):
    assert read("hub:owner/name").rows == [("train a", "yes"), ("train b", "no")]
    assert read("hub:owner/name/config@test").rows == [("test a", "yes"), ("test b", "no")]
    assert read_table("hub:name", ("text",), field="data.test").rows == [("test a",), ("test b",)]
    assert hub == [("owner/name",), ("owner/name", "config"), ("name",)]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hub:owner/missing", "can't be loaded: no route to the hub Check the name and the network"),
        ("hub:owner/name@tset", "has no split 'tset'. Write hub:owner/name@SPLIT. Did you mean 'test'?"),
        ("hub:", "is not hub:OWNER/NAME"),
        ("hub:a/b/c/d", "is not hub:OWNER/NAME"),
    ],
)
def test_a_hub_data_set_that_cannot_be_had_is_refused(source, said):
    assert said in refusal(source)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_field_may_be_longer_than_csv_s_own_limit(tmp_path, ending):
    separator = "," if ending == "csv" else "\t"
    path = tmp_path / f"rows.{ending}"
    path.write_text(f"text{separator}label\n{'long ' * 40_000}{separator}yes\n")
    ((text, label),) = read_table(str(path), ("text", "label"), field="data.train").rows
    assert (len(text), label) == (200_000, "yes")
