"""The page says what was found, to everybody, and runs nothing that came from the data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from smidgen.process.inspection import Finding, Found, Inspection, Lengths
from smidgen.process.recipe import Recipe
from smidgen.report import page, write_page
from smidgen.report.page import write_data_page

from .comparisons import comparison, failed, technique

HOSTILE = (
    """</script></style></title><img src=x onerror=alert(1)><svg/onload=alert(2)>" onmouseover="alert(3)' {{ 7*7 }}"""
)


class _Elements(HTMLParser):
    """Every element with its attributes, and the text of the page outside of styles and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts.append(data)
        elif self._within != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def _written(results: dict[str, Any], folder: Path) -> _Elements:
    path = folder / "report.html"
    write_page(results, path)
    return _Elements(path.read_text(encoding="utf-8"))


def test_the_answer_comes_first_with_the_numbers_that_carry_it(tmp_path: Path) -> None:
    text = _written(comparison(), tmp_path).text
    answer = text[: text.index("All techniques")]
    for words in (
        "Use LoRA",
        "LoRA against full fine-tuning",
        "85.8",
        "−0.8 points against 86.6 %",
        "25 %",
        "1 min 30 s",
    ):
        assert words in answer


def test_without_a_recommendation_the_best_technique_but_for_the_baseline_is_put_first(tmp_path: Path) -> None:
    text = _written(comparison(recommended=None), tmp_path).text
    assert "Head only against full fine-tuning" in text


def test_every_technique_has_a_row_best_first_and_failures_last(tmp_path: Path) -> None:
    results = comparison(4)
    results["techniques"] = [failed(9, "RuntimeError: out of memory"), *reversed(results["techniques"])]
    text = _written(results, tmp_path).text
    table = text[text.index("All techniques") : text.index("What the parameters buy")]
    rows = [
        "Full fine-tuning",
        "Head only",
        "LoRA",
        "Houlsby adapter",
        "Technique number 9",
        "RuntimeError: out of memory",
    ]
    assert sorted(rows, key=table.rindex) == rows


def test_a_lower_loss_is_the_better_one(tmp_path: Path) -> None:
    results = comparison(3, classes=0, metric="loss")
    text = _written(results, tmp_path).text
    table = text[text.index("All techniques") : text.index("What the parameters buy")]
    assert table.index("LoRA") < table.index("Head only")
    assert "lower is better" in table
    assert "0.858" in table
    assert "Which classes are confused" not in text


def test_each_seed_s_score_is_told(tmp_path: Path) -> None:
    results = comparison(2)
    results["techniques"][0]["scores"] = [0.861, 0.872, 0.865]
    assert "by seed 86.1, 87.2, 86.5" in _written(results, tmp_path).text


def test_two_techniques_of_one_title_are_told_apart(tmp_path: Path) -> None:
    results = comparison(3)
    results["techniques"].append(technique(3, [], title="LoRA"))
    text = _written(results, tmp_path).text
    assert "LoRA (1)" in text
    assert "LoRA (2)" in text


def test_two_classes_are_a_table_of_counts_and_77_a_drawing_with_their_mistakes_in_words(tmp_path: Path) -> None:
    few = _written(comparison(2, classes=2), tmp_path)
    assert any(table.get("class") == "matrix" for table in few.all("table"))
    assert "Most frequent mistakes" not in few.text
    many = _written(comparison(2, classes=77), tmp_path)
    assert not any(table.get("class") == "matrix" for table in many.all("table"))
    assert any(drawing.get("class") == "grid" for drawing in many.all("svg"))
    assert "Most frequent mistakes" in many.text
    cells = json.loads(many.scripts[0])["cells"][0]
    assert sum(count for true, predicted, count in cells if true == predicted) == 77 * 40


def test_the_command_and_the_recipe_can_be_copied_as_they_are(tmp_path: Path) -> None:
    recipe = "model: x\ntext: a < b & c  # indented\n  deep: [1, 2]\n"
    page_of = _written(comparison(recipe=recipe), tmp_path)
    assert recipe in page_of.text
    assert {button["data-copy"] for button in page_of.all("button")} == {"command", "recipe"}


def test_texts_from_outside_are_text_everywhere(tmp_path: Path) -> None:
    results = comparison(3, classes=12, title=HOSTILE, advice=HOSTILE, recipe=HOSTILE, command=HOSTILE, created=HOSTILE)
    results |= {"model": {"id": HOSTILE, "parameters": 1}, "task": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    results["data"] |= {"name": HOSTILE, "notes": [HOSTILE], "labels": [HOSTILE] * 12}
    for row in results["techniques"]:
        row |= {"title": HOSTILE, "summary": HOSTILE, "per_class": [{"label": HOSTILE, "f1": 0.5}]}
    results["techniques"].append(failed(7, HOSTILE) | {"title": HOSTILE, "status": HOSTILE})
    clean = comparison(3, classes=12)
    clean["techniques"].append(failed(7))
    expected = {tag for tag, _ in _written(clean, tmp_path).elements}
    found = _written(results, tmp_path)
    assert {tag for tag, _ in found.elements} <= expected
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in found.text
    assert len(found.scripts) == 2
    assert json.loads(found.scripts[0])["labels"] == [HOSTILE] * 12


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    found = _written(comparison(4, classes=77), tmp_path)
    addresses = [
        value
        for _, attributes in found.elements
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "action", "data", "xlink:href"}
    ]
    assert set(addresses) == {"data:,", "#answer"}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert "url(" not in html
    policy = next(meta for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_tables_have_headers_and_captions_and_charts_have_words(tmp_path: Path) -> None:
    found = _written(comparison(4, classes=12), tmp_path)
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(header.get("scope") in {"row", "col"} for header in found.all("th"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in found.all("svg"))
    assert "LoRA: 85.8 % (82.8–88.8), 5,678,304 trained parameters" in str(
        next(svg["aria-label"] for svg in found.all("svg") if "chart" in str(svg["class"]))
    )


def test_a_technique_has_one_colour_and_shape_wherever_it_is_shown(tmp_path: Path) -> None:
    write_page(comparison(12, classes=2), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    groups = re.findall(r'<g class="technique (\w+)"><title>([^:]+):', html)
    colours: dict[str, set[str]] = {}
    for colour, label in groups:
        colours.setdefault(label, set()).add(colour)
    assert len(colours) == 12
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 12


def test_nothing_missing_stops_the_page(tmp_path: Path) -> None:
    whole = comparison(3, classes=3)
    for key in whole:
        _written({name: value for name, value in whole.items() if name != key}, tmp_path)
        _written(whole | {key: None}, tmp_path)
    for key in whole["techniques"][2]:
        for value in (None, float("nan")):
            changed = {**whole["techniques"][2], key: value}
            _written(whole | {"techniques": [*whole["techniques"][:2], changed]}, tmp_path)
    for key in ("epoch", "seconds", "validation_loss", "validation_score"):
        curve = [point | {key: None} for point in whole["techniques"][2]["curve"]]
        _written(whole | {"techniques": [whole["techniques"][0], {**whole["techniques"][2], "curve": curve}]}, tmp_path)
    _written({}, tmp_path)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "exact_match", "word_error_rate"])
@pytest.mark.parametrize("techniques", [1, 2, 12, 30])
def test_any_number_of_techniques_and_any_metric_can_be_drawn(tmp_path: Path, techniques: int, metric: str) -> None:
    found = _written(comparison(techniques, classes=0, metric=metric), tmp_path)
    charts = [svg for svg in found.all("svg") if str(svg["class"]).startswith("chart")]
    assert bool(charts)


def test_half_a_character_in_a_label_is_replaced(tmp_path: Path) -> None:
    assert "a?b" in _written(comparison(title="a\ud800b"), tmp_path).text


def test_a_text_where_a_number_belongs_is_an_error_and_the_old_page_stays(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    results = comparison()
    results["techniques"][0]["trained"] = "many"
    with pytest.raises(ValueError, match=r"techniques.0.trained"):
        write_page(results, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_page_of_nine_techniques_is_small(tmp_path: Path) -> None:
    for classes, most in ((2, 150_000), (77, 350_000)):
        write_page(comparison(9, classes=classes), tmp_path / "report.html")
        assert (tmp_path / "report.html").stat().st_size < most


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_technique_s_colour_stands_out_from_the_paper(theme: int) -> None:
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    block = style.split(":root {")[1 + theme].split("}")[0]
    colours = dict(re.findall(r"--(\w+): (#\w+)", block))
    paper = _luminance(colours["paper"])
    for name in [*(f"c{index}" for index in range(12)), "ink", "right", "wrong"]:
        lighter, darker = sorted((paper, _luminance(colours[name])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, name


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = (int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_of_the_data_holds_what_was_found_and_nothing_runs(tmp_path: Path) -> None:
    found = Inspection(
        notes=[HOSTILE],
        rows={"train": 3, "validation": 1, "test": 1},
        labels=[{"label": HOSTILE, "train": 3, "validation": 1, "test": 1}],
        lengths=[Lengths("train", 3, 5, 9, 1)],
        limit=8,
        language=None,
        findings=[Finding(HOSTILE, HOSTILE, [Found("train", 2, HOSTILE, HOSTILE)])],
        good=[HOSTILE],
    )
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "a.csv"}, "output": "out"})
    write_data_page(found, recipe, HOSTILE, tmp_path / "data.html")
    html = (tmp_path / "data.html").read_text()
    assert HOSTILE not in html
    assert html.count(str(escape(HOSTILE))) >= 6
    assert "script-src 'sha256-" in html
