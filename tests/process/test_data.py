from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smidgen.errors import UserError
from smidgen.process.data import Example, TaskData, load_data, read_examples
from smidgen.process.recipe import DataConfig, Task
from smidgen.process.splits import normalize

Rows = list[tuple[str, str]]
SPLITS = ("train", "validation", "test")


def load(folder: Path, task: Task = "classification", **fields: Any) -> TaskData:
    """Lists of rows are written to files first."""
    names = ("text", "label" if task == "classification" else "answer")
    for split in SPLITS:
        if isinstance(fields.get(split), list):
            lines = [",".join(f'"{value}"' for value in row) for row in [names, *fields[split]]]
            (folder / f"{split}.csv").write_text("\n".join(lines), encoding="utf-8")
            fields[split] = str(folder / f"{split}.csv")
    return load_data(DataConfig(**fields), task)


def refusal(folder: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        load(folder, **fields)
    return str(error.value)


def rows(count: int, labels: str = "xy") -> Rows:
    return [(f"text {row}", labels[row % len(labels)]) for row in range(count)]


def test_given_splits_are_taken_as_they_are(tmp_path):
    data = load(tmp_path, train=[("a", "y"), ("b", "x")], validation=[("c", "x")], test=[("d", "y")])
    assert data.labels == ("x", "y")
    assert data.train == [Example("a", label=1), Example("b", label=0)]
    assert data.validation == [Example("c", label=0)]
    assert data.test == [Example("d", label=1)]
    assert data.notes == ()


def test_missing_splits_are_made_without_duplicates_across_them(tmp_path):
    data = load(tmp_path, train=rows(80) + [(f"TEXT  {row}", "xy"[row % 2]) for row in range(20)])
    texts = [{normalize(example.text) for example in getattr(data, split)} for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 80
    assert [len(getattr(data, split)) for split in SPLITS] == [80, 10, 10]
    assert data.notes == (
        "Set aside from the 100 rows of data.train, with no text in two splits: data.test (10 rows) "
        "and data.validation (10 rows).",
    )


def test_made_splits_have_every_label_in_its_share(tmp_path):
    data = load(tmp_path, train=rows(300, "xxxxyz"), validation_share=0.2)
    for split, size in (("test", 30), ("validation", 60), ("train", 210)):
        labels = [example.label for example in getattr(data, split)]
        assert [labels.count(label) for label in range(3)] == [size * 4 // 6, size // 6, size // 6]


def test_only_the_missing_split_is_made(tmp_path):
    data = load(tmp_path, train=rows(50), test=[("new", "x")])
    assert [len(getattr(data, split)) for split in SPLITS] == [45, 5, 1]


@pytest.mark.parametrize(("given", "made"), [("validation", "test"), ("test", "validation")])
def test_a_made_split_shares_no_text_with_a_given_one(tmp_path: Path, given: str, made: str) -> None:
    train = rows(100)
    data = load(tmp_path, train=train, **{given: [*train[:60], ("new", "x")], f"{made}_share": 0.2})
    texts = {split: {example.text for example in getattr(data, split)} for split in SPLITS}
    assert len(texts[made]) == 20
    assert not texts[made] & (texts[given] | texts["train"])


def test_what_belongs_to_a_given_split_by_its_group_is_not_set_aside_into_another(tmp_path: Path) -> None:
    lines = ["text,label,who", *(f"text {n},{'xy'[n % 2]},person {n // 4}" for n in range(80))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (tmp_path / "test.csv").write_text("text,label,who\nnew,x,person 1\ntext 9,y,someone\n")
    config = DataConfig(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), group="who")
    data = load_data(config, "classification")
    aside = {int(example.text.split()[1]) // 4 for example in data.validation}
    assert aside
    assert not aside & {1, 2}  # person 1 is in the test, and text 9 is a text of person 2


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    first, again, other = (
        load(tmp_path, train=rows(60), seed=0),
        load(tmp_path, train=rows(60)[::-1], seed=0),
        load(tmp_path, train=rows(60), seed=1),
    )
    assert {example.text for example in first.test} == {example.text for example in again.test}
    assert {example.text for example in first.test} != {example.text for example in other.test}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("b", "A", "a"), ("A", "a", "b")),
        (("10", "9", "x"), ("10", "9", "x")),
        (("1", "01"), ("01", "1")),
        ((" pos", "neg "), ("neg", "pos")),
    ],
)
def test_labels_are_sorted_by_number_where_all_are_numbers_and_by_name_otherwise(tmp_path, labels, order):
    given = [(f"{label} {row}", label) for label in labels for row in range(3)]
    assert load(tmp_path, train=given, test=given, validation=given).labels == order


def test_labels_of_different_files_are_the_same_text(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "2"}')
    data = load(tmp_path, train=[("c", "1"), ("d", "2")], test=str(tmp_path / "test.jsonl"), validation=[("e", "2 ")])
    assert [example.label for example in data.test + data.validation] == [0, 1, 1]


def test_a_label_that_training_never_saw_is_refused_and_named(tmp_path):
    message = refusal(tmp_path, train=rows(20), test=[("a", "x"), ("b", "Y"), ("c", "Y")], validation=rows(2))
    assert message.startswith("data.test has labels that data.train lacks, in 2 of its 3 rows: 'Y'. Did you mean 'y'?")


def test_one_class_only_is_refused(tmp_path):
    assert "Every row of data.train has the label 'x'" in refusal(tmp_path, train=rows(20, "x"))


def test_too_few_rows_to_split_are_refused(tmp_path):
    message = refusal(tmp_path, train=[("a", "x"), ("A", "x"), ("b", "y")])
    assert message == (
        "data.train has 3 rows, and not two different texts for any label to set a test split aside from. "
        "Add rows, or give a file as data.test."
    )


def test_a_label_with_a_single_text_stays_in_training_and_is_noted(tmp_path):
    data = load(tmp_path, train=[*rows(40), ("rare", "z"), ("rare", "z")])
    assert [example.text for example in data.train if example.label == 2] == ["rare", "rare"]
    assert data.notes[-1] == "Too rare to be in the test split: 1 label ('z')."


def test_texts_with_different_labels_are_counted_and_stay_together(tmp_path):
    data = load(tmp_path, train=[*rows(40), ("Twice", "x"), ("twice", "y")])
    assert data.notes[0] == ("data.train gives 1 text different labels in different rows, such as 'twice': 'x', 'y'.")
    assert sorted(sum(e.text.lower() == "twice" for e in getattr(data, split)) for split in SPLITS) == [0, 0, 2]


def test_overlap_between_given_splits_is_counted_and_noted(tmp_path):
    data = load(tmp_path, train=rows(20), validation=[("TEXT 3", "x"), ("v", "y")], test=[("v", "x"), ("text 3", "x")])
    assert [note.split(":")[0] for note in data.notes] == [
        "1 of the 2 rows of data.validation have a text that data.train has as well",
        "1 of the 2 rows of data.test have a text that data.train has as well",
        "2 of the 2 rows of data.test have a text that data.validation has as well",
    ]


def test_a_text_that_a_test_split_repeats_is_counted_and_noted(tmp_path):
    data = load(tmp_path, train=rows(20), test=[("new", "x"), ("New", "x"), ("other", "y"), ("new ", "x")])
    assert "2 of the 4 rows of data.test repeat the text of an earlier one" in data.notes[0]


def test_bad_rows_are_an_error_or_a_note(tmp_path):
    given = [*rows(20), ("", "x")]
    assert "line 22: empty text" in refusal(tmp_path, train=given)
    data = load(tmp_path, train=given, bad_rows="skip")
    assert "line 22: empty text" in data.notes[0]


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    message = refusal(tmp_path, train=rows(4), label="lable")
    assert "has no column 'lable'. Did you mean 'label'? Known: text, label." in message


def test_generation_keeps_answers_and_has_no_labels(tmp_path):
    given = [(f"question {row}", " the answer ") for row in range(30)]
    data = load(tmp_path, "generation", train=given)
    assert data.labels == ()
    assert data.test[0].answer == " the answer "
    assert [len(getattr(data, split)) for split in SPLITS] == [24, 3, 3]


def test_one_question_with_several_answers_stays_on_one_side(tmp_path):
    given = [(f"question {row // 5}", f"answer {row}") for row in range(100)]
    data = load(tmp_path, "generation", train=given)
    texts = [{example.text for example in getattr(data, split)} for split in SPLITS]
    assert sum(map(len, texts)) == 20


def test_the_fingerprint_follows_the_rows_and_not_the_file(tmp_path):
    before = load(tmp_path, train=rows(30)).fingerprint()
    assert load(tmp_path, train=rows(30)).fingerprint() == before
    assert load(tmp_path, train=rows(31)).fingerprint() != before


def test_a_group_is_never_parted_and_what_two_given_splits_share_is_said(tmp_path):
    lines = ["text,label,person", *(f"text {row},{'xy'[row % 2]},p{row // 4}" for row in range(120))]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    data = load_data(DataConfig(train=str(tmp_path / "all.csv"), group="person"), "classification")
    person = {f"text {row}": row // 4 for row in range(120)}
    people = [{person[example.text] for example in split} for split in (data.train, data.validation, data.test)]
    assert not people[0] & people[1]
    assert not (people[0] | people[1]) & people[2]
    assert all(people)
    assert "with no text and no group in two splits" in data.notes[0]
    (tmp_path / "test.csv").write_text("text,label,person\nnew,x,p3\nother,y,new\n")
    config = DataConfig(train=str(tmp_path / "all.csv"), test=str(tmp_path / "test.csv"), group="person")
    said = "1 of the 2 rows of data.test belong to 1 group of data.train ('p3'): a score on them is no measure"
    assert any(note.startswith(said) for note in load_data(config, "classification").notes)
    (tmp_path / "new.csv").write_text("text,label\nnew,x\n")
    assert len(read_examples(str(tmp_path / "new.csv"), config, "classification", ("x", "y"))[0]) == 1


def test_a_draw_of_fewer_rows_is_part_of_one_of_more_and_leaves_the_test_split(tmp_path):
    everything = load(tmp_path, train=rows(100))
    few, more = (load(tmp_path, train=rows(100), rows=count, draw=1) for count in (7, 20))
    assert [len(few.train), len(few.validation), len(more.train), len(more.validation)] == [7, 7, 20, 10]
    assert set(few.train) < set(more.train) < set(everything.train)
    assert few.test == more.test == everything.test
    assert few.labels == everything.labels
    assert few.notes[-1] == "Draw 1 of 80 training rows: 7 to train on, 7 to validate on."
    assert load(tmp_path, train=rows(100), rows=7, draw=2).train != few.train


@pytest.mark.parametrize("seed", range(20))
def test_the_last_text_of_a_span_s_label_stays_in_training(tmp_path, seed):
    lines = [{"text": f"to town {row}", "spans": [{"start": 3, "end": 7, "label": "city"}]} for row in range(30)]
    lines.append({"text": "by bike to town", "spans": [{"start": 3, "end": 7, "label": "means"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_data(DataConfig(train=str(tmp_path / "rows.jsonl"), seed=seed), "token-classification")
    assert found.labels == ("city", "means")
    assert {span.label for row in found.train for span in row.spans or ()} == {"city", "means"}
    assert "Too rare to be in the test split: 1 label ('means')." in found.notes


def test_spans_of_which_each_text_has_the_last_of_a_label_are_split_all_the_same(tmp_path):
    spans = [
        [{"start": 0, "end": 4, "label": "city"}, {"start": 5, "end": 6, "label": f"own{row}"}] for row in range(8)
    ]
    lines = [json.dumps({"text": f"town {row}", "spans": own}) for row, own in enumerate(spans)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = load_data(DataConfig(train=str(tmp_path / "rows.jsonl")), "token-classification")
    assert len(found.train) + len(found.validation) + len(found.test) == 8
    assert found.notes[-1].startswith("Left without a row to train on: 2 labels ('own")


def test_labels_that_a_draw_leaves_without_rows_are_said(tmp_path):
    drawn = load(tmp_path, train=rows(100, labels="abcdefghij"), rows=7)
    without = set(drawn.labels) - {drawn.labels[row.label] for row in drawn.train}
    assert drawn.notes[-1].startswith(f"Left without a row to train on: {len(without)} labels ('")


def test_more_rows_than_there_are_cannot_be_drawn(tmp_path):
    said = refusal(tmp_path, train=rows(100), rows=81)
    assert said == "data.rows=81 is more than the 80 rows that there are to train on."
