"""Spans become tags and tags spans; what is no span of a text is named."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from smidgen.errors import UserError
from smidgen.placeholders import IGNORED
from smidgen.process.data import Example, load_data, read_examples
from smidgen.process.encoding import encode
from smidgen.process.recipe import DataConfig
from smidgen.process.spans import Run, Span, labels_of, read_spans, runs, spans_of, tag_names, tags_of
from tests.process.test_encoding import BYTE, WORD, WORDS, word_tokenizer

LABELS = ["city", "time", "B-side"]


def words_and_spans() -> st.SearchStrategy[tuple[str, list[Span]]]:
    """A text of words, and some runs of them as spans."""

    @st.composite
    def drawn(draw: st.DrawFn) -> tuple[str, list[Span]]:
        words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9))
        starts = [sum(map(len, words[:place])) + place for place in range(len(words))]
        spans, place = [], 0
        while place < len(words):
            length = draw(st.integers(1, 3))
            last = min(place + length, len(words)) - 1
            if draw(st.booleans()):
                label = draw(st.sampled_from(LABELS))
                spans.append(Span(starts[place], starts[last] + len(words[last]), label))
            place = last + 1
        return " ".join(words), spans

    return drawn()


@pytest.mark.parametrize("tokenizer", [WORD, BYTE], ids=["a token a word", "a token a byte"])
@given(words_and_spans(), st.sampled_from(["{text}", "the fish: {text} of"]))
def test_spans_come_back_from_their_tags(tokenizer, drawn, template):
    text, spans = drawn
    rows, cut = encode(
        [Example(text, spans=tuple(spans))],
        "token-classification",
        tokenizer,
        max_length=200,
        template=template,
        labels=LABELS,
    )
    (row,) = rows
    assert isinstance(row.labels, list)
    assert len(row.labels) == len(row.input_ids) == len(row.offsets)
    assert spans_of(row.labels, row.offsets, LABELS) == tuple(spans)
    assert cut == 0
    assert all(
        (label == IGNORED) == (start == end) for label, (start, end) in zip(row.labels, row.offsets, strict=True)
    )


def test_a_span_that_was_cut_off_is_gone_and_the_others_stay():
    spans = (Span(4, 9, "city"), Span(14, 18, "time"))
    rows, cut = encode(
        [Example("the great red fish", spans=spans)], "token-classification", WORD, max_length=5, labels=LABELS
    )
    assert WORD.convert_ids_to_tokens(rows[0].input_ids) == ["[CLS]", "the", "great", "red", "[SEP]"]
    assert rows[0].labels == [IGNORED, 0, 1, 0, IGNORED]
    assert cut == 1


def test_tags_have_the_names_of_the_field():
    assert tag_names(["city", "time"]) == ("O", "B-city", "I-city", "B-time", "I-time")
    assert labels_of(tag_names(LABELS)) == tuple(LABELS)


def test_tags_that_do_not_agree_are_read_as_conlleval_reads_them():
    assert runs([2, 2, 0, 4, 2, 1, 1, 2]) == [Run(0, 1, 0), Run(3, 3, 1), Run(4, 4, 0), Run(5, 5, 0), Run(6, 7, 0)]
    assert runs([IGNORED, 1, IGNORED, 2, 0]) == [Run(1, 1, 0), Run(3, 3, 0)]


def test_a_token_belongs_to_the_first_span_in_it():
    tags = tags_of([Span(0, 2, "city"), Span(2, 4, "time"), Span(5, 6, "time")], [(0, 4), (4, 5), (5, 6)], LABELS)
    assert tags == [1, 0, 3]


def test_white_space_belongs_to_no_span_and_to_no_token():
    assert read_spans([{"start": 2, "end": 9, "label": "city"}], "in  Rome now") == (Span(4, 8, "city"),)
    spans = read_spans([{"start": 0, "end": 5, "label": "city"}], "the red fish")
    rows, _ = encode([Example("the red fish", spans=spans)], "token-classification", BYTE, max_length=99, labels=LABELS)
    assert rows[0].offsets[3] == (4, 4)  # the space, which this tokenizer has a token for
    assert rows[0].labels[:6] == [1, 2, 2, IGNORED, 2, 0]
    assert spans_of(rows[0].labels, rows[0].offsets, LABELS) == (Span(0, 5, "city"),)


def test_an_accent_that_the_tokenizer_drops_belongs_to_the_token_before_it():
    """As BERT's does of a text that macOS wrote, in which an accent is a character of its own."""
    dropping = word_tokenizer()
    dropping.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    text, spans = "fishe\u0301 red\u0301\u0302 of", (Span(0, 6, "city"), Span(7, 12, "time"))
    rows, _ = encode([Example(text, spans=spans)], "token-classification", dropping, max_length=9, labels=LABELS)
    assert rows[0].offsets == ((0, 0), (0, 6), (7, 12), (13, 15), (0, 0))
    assert spans_of(rows[0].labels, rows[0].offsets, LABELS) == spans


def test_a_span_that_ends_inside_a_token_is_never_found():
    rows, _ = encode(
        [Example("redfish", spans=(Span(0, 3, "city"),))], "token-classification", WORD, max_length=9, labels=LABELS
    )
    assert rows[0].spans == (Span(0, 3, "city"),)
    assert spans_of(rows[0].labels, rows[0].offsets, LABELS) == (Span(0, 7, "city"),)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("Rome", "spans is not JSON (Expecting value), such as"),
        ("{}", "spans is not a list such as"),
        (4, "spans is not a list such as"),
        (None, "no spans; a text without any has []"),
        (" ", "no spans; a text without any has []"),
        ('[{"start": 0, "start": 1}]', "spans is not JSON (the key 'start' appears twice)"),
        ({"start": 0}, "spans is not a list such as"),
        (["Rome"], "the span 'Rome' is not an object in {...}"),
        ([{"start": 0, "end": 4}], "the span {'start': 0, 'end': 4} has no label"),
        ([{"start": True, "end": 4, "label": "a"}], "has the start True, which is not a whole number"),
        ([{"start": 0, "end": 4.0, "label": "a"}], "has the end 4.0, which is not a whole number"),
        ([{"start": 0, "end": 4, "label": 7}], "has the label 7, which is not text"),
        ([{"start": 0, "end": 4, "label": " "}], "the span from 0 to 4 has an empty label"),
        ([{"start": 0, "end": 4, "label": "w\ud800"}], "broken UTF-8 in a label"),
        ("[" * 100_000, "spans is not JSON"),
        ([{"start": 3, "end": 3, "label": "a"}], "a span from 3 to 3 does not lie in a text of 12 characters"),
        ([{"start": 8, "end": 13, "label": "a"}], "a span from 8 to 13 does not lie in a text of 12 characters"),
        ([{"start": 4, "end": 5, "label": "a"}], "the span from 4 to 5 holds white space alone"),
        (
            [{"start": 5, "end": 7, "label": "a"}, {"start": 0, "end": 6, "label": "b"}],
            "two spans overlap at character 5",
        ),
    ],
)
def test_what_is_no_span_is_named(value, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_spans(value, "Rome or Oslo")


ROW = {
    "text": "Rome or Oslo",
    "spans": [{"start": 8, "end": 12, "label": "city"}, {"start": 0, "end": 4, "label": "city"}],
}


def test_spans_are_read_from_lists_and_from_text(tmp_path):
    rows = [{**ROW, "text": f"Rome or Oslo {number}"} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quoted = [json.dumps(row["spans"]).replace('"', '""') for row in rows]
    lines = [f'{row["text"]},"{spans}"' for row, spans in zip(rows, quoted, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,spans", *lines]))
    data = [
        load_data(DataConfig(train=str(tmp_path / name)), "token-classification") for name in ("rows.jsonl", "rows.csv")
    ]
    assert data[0].fingerprint() == data[1].fingerprint()
    assert data[0].labels == ("city",)
    assert data[0].train[0].spans == (Span(0, 4, "city"), Span(8, 12, "city"))


def test_bad_spans_are_bad_rows(tmp_path):
    wrong = [{**ROW, "spans": [{"start": 0, "end": 99, "label": "city"}]}, {"text": "Rome"}]
    good = [{"text": f"Rome {number}", "spans": []} for number in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROW, *good, *wrong])))
    config = DataConfig(train=str(path))
    with pytest.raises(Exception, match=r"2 of 12 rows can't.*line 11: a span from 0 to 99.*line 12: no spans"):
        load_data(config, "token-classification")
    data = load_data(config.model_copy(update={"bad_rows": "skip"}), "token-classification")
    assert len(data.train) + len(data.validation) + len(data.test) == 10


def test_labels_that_training_lacks_and_no_span_at_all_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**ROW, "text": f"Rome or Oslo {n}"}) for n in range(9)))
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"text": "now", "spans": [{"start": 0, "end": 3, "label": "time"}]})
    )
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": "now", "spans": []}))
    train, other, none = (str(tmp_path / f"{name}.jsonl") for name in ("rows", "other", "none"))
    with pytest.raises(UserError, match="data.test has labels that data.train lacks, in 1 of its 1 rows: 'time'"):
        load_data(DataConfig(train=train, test=other), "token-classification")
    with pytest.raises(UserError, match="No row of data.train has a span"):
        load_data(DataConfig(train=none), "token-classification")
    with pytest.raises(UserError, match="labels that the adapter was not trained on: 'time'"):
        read_examples(other, DataConfig(train=train), "token-classification", ["city"])
