"""What is wrong with data is found where it is, and nothing is found in data that are sound."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.errors import UserError
from smidgen.process import inspection as module
from smidgen.process.inspection import Finding, Inspection, inspect_data
from smidgen.process.job import Job
from smidgen.process.mislabelled import doubtful
from smidgen.process.odd_text import damage, foreign
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.saved_splits import are_of, save_splits
from smidgen.process.similar import nearly_equal
from tests.process.tiny import save_model

SUBJECTS = {
    "card": "my card was lost and I need a new card with another number",
    "transfer": "the transfer of money to a friend abroad has not arrived yet",
    "rate": "which exchange rate do you use for euros and pounds today",
}


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts whose words say their label."""
    draw = random.Random(seed)
    labels = [draw.choice(list(SUBJECTS)) for _ in range(count)]
    return [
        (f"{' '.join(draw.sample(SUBJECTS[label].split(), 8))} {number}", label) for number, label in enumerate(labels)
    ]


def job(folder: Path, splits: dict[str, list[dict]], **fields: object) -> Job:
    folder.mkdir(exist_ok=True)
    save_model(folder / "model")
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {**{split: f"{split}.jsonl" for split in splits}, **fields.pop("data", {})}  # type: ignore[dict-item]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"model": "model", "data": data, **fields}))
    return prepare(load_recipe(recipe))


def rows(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"text": text, "label": label} for text, label in pairs]


def found(inspection: Inspection, title: str) -> Finding:
    (finding,) = [finding for finding in inspection.findings if finding.title == title]
    return finding


def test_sound_data_have_nothing_to_look_at(tmp_path: Path) -> None:
    pairs = sentences(300)
    inspection = inspect_data(job(tmp_path, {"train": rows(pairs[:240]), "test": rows(pairs[240:])}))
    assert [finding.title for finding in inspection.findings if "same" not in finding.title] == []
    assert inspection.language == "en"
    assert sum(label["train"] + label["validation"] + label["test"] for label in inspection.labels) == 300
    assert "No label looks wrong." in inspection.good


def test_what_is_wrong_is_found_where_it_is(tmp_path: Path) -> None:
    pairs = sentences(300)
    train, test = rows(pairs[:240]), rows(pairs[240:])
    train[4] = {"text": test[9]["text"], "label": test[9]["label"]}
    train[7]["label"] = "rate" if train[7]["label"] != "rate" else "card"
    train[11] = dict(train[20])
    train[30]["text"] = "caf\u00c3\u00a9 &amp; my card"
    train[31]["text"] = "Wo ist meine neue Karte geblieben, ich warte schon lange darauf"
    train[32] = {"text": "my card is blue", "label": "seldom"}
    train[33] = {"text": "my card is red", "label": "seldom"}
    inspection = inspect_data(job(tmp_path, {"train": train, "test": test, "validation": rows(sentences(20, seed=1))}))
    shared = found(inspection, "Texts in two splits")
    assert [(row.split, row.number) for row in shared.rows] == [("test", 10)]
    assert ("train", 8) in [(row.split, row.number) for row in found(inspection, "Labels that may be wrong").rows]
    assert [(row.number, row.note) for row in found(inspection, "Repeated texts").rows] == [(12, "2 times")]
    damaged = found(inspection, "Texts that look damaged")
    assert [(row.number, row.note) for row in damaged.rows] == [
        (31, "UTF-8 that was read as Western European (\u00c3\u00a9)")
    ]
    assert [(row.number, row.note) for row in found(inspection, "Other languages").rows] == [(32, "looks like de")]
    assert "seldom (2)" in found(inspection, "Rare labels").summary
    assert "seldom" in found(inspection, "Labels without a test").summary


def test_lengths_are_those_of_whole_rows(tmp_path: Path) -> None:
    texts = ["the fish", "the great red fish of the river", *["a fish"] * 8]
    pairs = [{"text": f"{text} {'a ' * number}", "label": "xy"[number % 2]} for number, text in enumerate(texts)]
    inspection = inspect_data(
        job(tmp_path, {"train": pairs, "validation": pairs, "test": pairs}, data={"max_length": 6})
    )
    (train, *_) = inspection.lengths
    assert (train.longest, inspection.limit) == (2 + 2 + 9, 6)
    assert train.cut == sum(len(row["text"].split()) + 2 > 6 for row in pairs)


def test_other_tasks_are_looked_at_as_well(tmp_path: Path) -> None:
    spans = [
        {"text": f"the fish {n} of the river", "spans": [{"start": 4, "end": 8, "label": "fish"}]} for n in range(40)
    ]
    spans[3] = {"text": spans[4]["text"], "spans": []}
    inspection = inspect_data(job(tmp_path / "spans", {"train": spans}, task="token-classification"))
    assert found(inspection, "Different spans of one text").rows[0].note in ("fish 4-8 / ", " / fish 4-8")
    again = [
        {"text": text, "spans": [{"start": start, "end": start + 4, "label": "city"}]}
        for text, start in (("go to  Rome", 7), ("go to Rome", 6))
    ]
    spaced = inspect_data(job(tmp_path / "spaced", {"train": [*spans[5:], *again]}, task="token-classification"))
    assert "Different spans of one text" not in {one.title for one in spaced.findings}
    assert sum(inspection.labels[0][split] for split in ("train", "validation", "test")) == 39


def test_saved_splits_are_the_same_splits(tmp_path: Path) -> None:
    grouped = [{"text": text, "topic": label, "who": text[-1]} for text, label in sentences(200)]
    started = job(tmp_path / "a", {"train": grouped}, data={"label": "topic", "group": "who"})
    again = prepare(load_recipe(save_splits(started.recipe, started.data, tmp_path / "fixed")))
    for split in ("train", "validation", "test"):
        assert getattr(again.data, split) == getattr(started.data, split)
    assert again.labels == started.labels
    assert again.recipe.training == started.recipe.training
    with pytest.raises(UserError, match="is there already, and what is in it would be lost"):
        save_splits(started.recipe, started.data, tmp_path / "fixed")


def test_splits_say_of_which_rows_they_are(tmp_path: Path) -> None:
    started = job(tmp_path / "a", {"train": rows(sentences(100))})
    save_splits(started.recipe, started.data, tmp_path / "fixed")
    assert are_of(tmp_path / "fixed", started.recipe, started.data)
    other = job(tmp_path / "b", {"train": rows(sentences(101))})
    assert not are_of(tmp_path / "fixed", other.recipe, other.data)


def test_a_row_s_number_is_that_of_the_saved_split_though_few_rows_are_drawn(tmp_path: Path) -> None:
    pairs = sentences(100)
    pairs[70] = (pairs[20][0], pairs[20][1])
    path = job(tmp_path, {"train": rows(pairs)}, data={"rows": 10}).recipe
    path.save(tmp_path / "drawn.yaml")
    main_in = [sys.executable, "-m", "smidgen", "data", str(tmp_path / "drawn.yaml"), "--save", str(tmp_path / "fixed")]
    told = json.loads(subprocess.run([*main_in, "--json"], capture_output=True, text=True, check=True).stdout)
    (finding,) = [one for one in told["findings"] if one["title"] == "Repeated texts"]
    for row in finding["rows"]:
        lines = (tmp_path / "fixed" / f"{row[0]}.jsonl").read_text().splitlines()
        assert json.loads(lines[row[1] - 1])["text"] == row[2]


def test_what_was_not_looked_at_is_said_beside_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = sentences(300)
    monkeypatch.setattr(module, "MOST_COMPARED", 100)
    inspection = inspect_data(job(tmp_path, {"train": rows(pairs), "test": rows(pairs[:30])}))
    (near,) = [one for one in inspection.findings if one.title == "Nearly the same in two splits"] or [None]
    said = [near.summary] if near is not None else [one for one in inspection.good if "nearly the same" in one]
    assert said[0].endswith("(The first 100 rows were looked at.)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a plain text, with caf\u00e9 and \u201cquotes\u201d \U0001f600", None),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u6c34", None),
        ("caf\u00c3\u00a9", "UTF-8 that was read as Western European (\u00c3\u00a9)"),
        ("it\u00e2\u20ac\u2122s", "UTF-8 that was read as Western European (\u00e2\u20ac\u2122)"),
        ("caf\ufffd", "a character that was lost in reading (\ufffd)"),
        ("you &amp; me", "marks of a web page (&amp;)"),
        ("<br/>here", "marks of a web page (<br/>)"),
        ("1 < 2 & 3 > 2", None),
        ("bell\x07", "control characters"),
        ("?!", "no letter and no digit"),
    ],
)
def test_damage_is_told_from_what_is_meant(text: str, said: str | None) -> None:
    assert damage(text) == said


def test_a_language_is_told_by_long_texts_alone() -> None:
    english = [f"this is a longer sentence in plain English, number {n}" for n in range(9)]
    german = "und das hier ist ein ganz anderer Satz auf Deutsch"
    assert foreign([*english, german, "ja", "Blah"]) == ("en", {9: "de"})
    assert foreign(["ja", "si"]) == (None, {})
    assert foreign([]) == (None, {})
    assert foreign([english[0], german]) == (None, {})


def test_wrong_labels_are_doubted_before_right_ones() -> None:
    pairs = sentences(400)
    draw = random.Random(1)
    wrong = set(draw.sample(range(400), 20))
    labels = [
        draw.choice([other for other in SUBJECTS if other != label]) if row in wrong else label
        for row, (_, label) in enumerate(pairs)
    ]
    doubts = doubtful([text for text, _ in pairs], labels)
    assert len({doubt.row for doubt in doubts} & wrong) >= 18
    assert len({doubt.row for doubt in doubts[:18]} & wrong) >= 17
    assert all(pairs[doubt.row][1] == doubt.label for doubt in doubts if doubt.row in wrong)
    assert doubtful(["a", "b"], ["x", "y"]) == []


def test_similar_texts_are_found_with_their_like() -> None:
    others = ["where is my new card", "the transfer has not arrived", "which rate is it today"]
    texts = ["where is my new card?", "nothing of the kind here", "The transfer has not  arrived!"]
    pairs = nearly_equal(texts, others, least=0.8)
    assert {(pair.one, pair.other) for pair in pairs} == {(0, 0), (2, 1)}
    assert not nearly_equal(["Xylophonic quetzals juggle vexingly: where is my new card"], others)
    assert nearly_equal([], others) == nearly_equal(texts, []) == nearly_equal(["a"], ["?"]) == []
