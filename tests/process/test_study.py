"""The five promises, each measured on a tiny model: what is said is what the runs measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from smidgen.errors import UserError
from smidgen.process.compare import compare
from smidgen.process.data import load_data
from smidgen.process.equivalence import equivalence
from smidgen.process.finding import Finding
from smidgen.process.recipe import load_recipe
from smidgen.process.studies import STUDIES
from smidgen.process.studies.little_data import few_run
from smidgen.process.studies.parity import _answer, study_parity
from smidgen.process.study import study
from smidgen.report.terminal import finding_lines
from tests.process.tiny import save_recipe, save_rows

RECIPE = """\
training: {epochs: 2, batch_size: 8, learning_rate: 0.01, head_learning_rate: 0.01}
compare: [full, lora]
seeds: [0, 1]
study:
  sizes: [8]
  draws: 2
  steps: 4
  tasks:
    other: {train: other.csv}
    third: {train: third.csv}
"""


PORTABLE = ["compare=[full, lora, pfeiffer]", "study.sizes=[]"]


def save(folder: Path, text: str = RECIPE, **kind: bool) -> Path:
    path = save_recipe(folder, text, **kind)
    save_rows(folder / "third.csv", rows=40)
    rows = save_rows(folder / "other.csv", rows=50).read_text()
    (folder / "other.csv").write_text(rows.replace(",yes", ",up").replace(",no", ",down"))
    return path


pytestmark = pytest.mark.usefixtures("runs_here")


@pytest.fixture(scope="module")
def studied(runs_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finding]]:
    path = save(tmp_path_factory.mktemp("study"))
    found = {}
    for promise in STUDIES:
        changes = PORTABLE if promise == "portability" else []
        found[promise], failures = study(load_recipe(path, changes), promise, command=f"smidgen study {promise}")
        assert not failures
    return path.parent / "out", found


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def test_every_study_answers_in_words_with_a_table_and_a_chart(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    page = (output / "study.html").read_text()
    for promise, finding in found.items():
        assert finding.answer
        assert finding.notes
        assert all(len(row) == len(finding.headings) for row in finding.table)
        assert finding.chart is not None
        assert f'id="{promise}"' in page
        assert json.loads((output / "study" / f"{promise}.json").read_text())["answer"] == finding.answer
    shared = "have a text that study.tasks.third has as well"
    assert all(any(shared in note for note in found[promise].notes) for promise in ("forgetting", "portability"))
    assert "http" not in page.split("<body>")[1].replace("http://www.w3.org/2000/svg", "")


def test_all_findings_of_a_page_say_which_recipe_they_are_of(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, _ = studied
    written = json.loads((output / "study" / "cost.json").read_text())
    assert {"created", "smidgen", "command", "recipe", "failures"} <= written.keys()
    page = (output / "study.html").read_text()
    assert page.count("Measured with another recipe") == 1  # portability, whose compare is another


def test_parity_pairs_the_seeds(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    row = next(row for row in found["parity"].rows if row["technique"] == "lora")
    scores = {
        name: [metrics(output / f"runs/{name}-s{seed}")["test"]["accuracy"] for seed in (0, 1)]
        for name in ("full", "lora")
    }
    assert row["difference"] == pytest.approx(np.mean(scores["lora"]) - np.mean(scores["full"]))
    assert row["scores"] == scores["lora"]


def test_parity_asks_for_more_seeds_only_where_more_would_tell() -> None:
    titles = {"near": "Near", "few": "Few"}
    found = {
        name: equivalence([value / 100 for value in own], 0.01, level=0.025)
        for name, own in (("near", [-0.98, -0.85, -0.99, -0.9]), ("few", [-0.9, 0.9, 0.1, -0.2]))
    }
    words = _answer(titles, found, dict.fromkeys(found, "open"), "1 point", 4)
    assert "Not shown either way with 4 seeds: Near and Few. If Few is as good, " in words
    assert words.endswith(
        "The difference of Near is neither none, which as many seeds would show, nor clearly beyond 1 point."
    )


def parity(folder: Path, differences: dict[str, list[float]], test_rows: int = 1000) -> Finding:
    """The study of runs whose scores differ so much from full fine-tuning's."""
    seeds = list(range(len(next(iter(differences.values())))))
    recipe = load_recipe(save_recipe(folder), [f"compare={['full', *differences]}", f"seeds={seeds}"])
    scores = {"full": [0.9 for _ in seeds], **{name: [0.9 + d for d in own] for name, own in differences.items()}}
    trainer = SimpleNamespace(
        train_compared=lambda: {name: [{"test": {"accuracy": score}} for score in own] for name, own in scores.items()},
        failures={},
    )
    return study_parity(recipe, SimpleNamespace(test=[None] * test_rows), trainer)


def test_parity_of_one_among_several_must_pass_after_their_correction(tmp_path: Path) -> None:
    near, far = [0.0086, -0.0086, 0.0086, -0.0086, 0.0], [0.05, -0.05, 0.05, -0.05, 0.0]
    for name, differences, said in (
        ("one", {"lora": near}, "same"),
        ("four", {"lora": near, "houlsby": far, "bitfit": far, "head": far}, "open"),
    ):
        (tmp_path / name).mkdir()
        found = parity(tmp_path / name, differences)
        assert found.rows[0]["verdict"] == said
        assert found.rows[0]["p"] == pytest.approx(0.03, abs=0.002)


def test_parity_does_not_believe_two_equal_seeds_of_few_rows(tmp_path: Path) -> None:
    assert parity(tmp_path, {"lora": [0.0, 0.0]}, test_rows=48).rows[0]["verdict"] == "open"


def test_cost_is_what_the_runs_took_beside_the_plan(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    rows = {row["technique"]: row for row in found["cost"].rows}
    runs = [metrics(output / f"runs/lora-s{seed}") for seed in (0, 1)]
    assert rows["lora"]["seconds"] == pytest.approx(np.mean([run["seconds"] for run in runs]))
    assert rows["lora"]["optimizer_bytes"] == 2 * 4 * runs[0]["trained"]
    assert rows["full"]["tasks_bytes"] == 10 * metrics(output / "runs/full-s0")["disk_bytes"]
    assert rows["lora"]["tasks_bytes"] == 4 * runs[0]["base_parameters"] + 10 * runs[0]["disk_bytes"]
    assert 0 < rows["lora"]["activation_bytes"] < rows["full"]["memory_bytes"]


def test_few_rows_get_as_many_steps_and_their_own_validation(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    run = metrics(output / "few/lora-n8-d1")
    assert run["steps"] == 4
    assert "Draw 1 of 48 training rows: 8 to train on, 6 to validate on." in run["notes"]
    points = {row["rows"]: row["scores"] for row in found["little-data"].rows if row["technique"] == "lora"}
    assert set(points) == {8, 48}
    assert points[8][1] == run["test"]["accuracy"]
    assert points[48] == [metrics(output / f"runs/lora-s{seed}")["test"]["accuracy"] for seed in (0, 1)]


def test_forgetting_scores_earlier_tasks_with_their_own_heads(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    row = next(row for row in found["forgetting"].rows if row["technique"] == "lora")
    first = [metrics(output / f"runs/lora-s{seed}")["test"]["accuracy"] for seed in (0, 1)]
    assert [matrix[0][0] for matrix in row["matrices"]] == first
    assert [len(stage) for stage in row["matrices"][0]] == [1, 2, 3]
    assert row["matrices"][0][2][2] == metrics(output / "sequence/lora-s0-3-third")["test"]["accuracy"]
    assert row["kept"] == pytest.approx(np.mean([matrix[2][:2] for matrix in row["matrices"]]))
    assert {row["technique"]: row["untouched"] for row in found["forgetting"].rows} == {
        "full": False,
        "lora": True,
    }


def test_an_adapter_carries_over_in_every_way_that_it_can(studied: tuple[Path, dict[str, Finding]]) -> None:
    _, found = studied
    assert {row["technique"] for row in found["portability"].rows} == {
        *("full", "full-from-other", "full-from-third", "full-head-other", "full-head-third"),
        *("lora", "lora-from-other", "lora-from-third", "lora-head-other", "lora-head-third", "lora-mean"),
        *("pfeiffer", "pfeiffer-from-other", "pfeiffer-from-third", "pfeiffer-mean", "pfeiffer-fusion"),
    }
    anew = [row["scores"] for row in found["portability"].rows if row["technique"] == "lora"]
    assert anew == [row["scores"] for row in found["parity"].rows if row["technique"] == "lora"]


def test_a_study_measures_nothing_twice(studied: tuple[Path, dict[str, Finding]]) -> None:
    output, found = studied
    files = {file: file.stat().st_mtime_ns for file in output.glob("*/*/metrics.json")}
    told: list[str] = []
    recipe = load_recipe(output.parent / "recipe.yaml", PORTABLE)
    again, _ = study(recipe, "portability", command="", tell=told.append)
    assert again == found["portability"]
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert not any(" of " in line and "accuracy" in line for line in told)


def test_two_processes_cannot_study_one_recipe(tmp_path: Path) -> None:
    path = save(tmp_path)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="Another smidgen is at work in"):
        study(load_recipe(path), "parity", command="")


@pytest.mark.parametrize(
    ("promise", "changes", "said"),
    [
        ("parity", ["compare=[lora]"], "lacks full"),
        ("parity", ["compare=[full]"], "nothing beside full"),
        ("parity", ["seeds=[0]"], "says nothing about chance"),
        ("little-data", ["study.sizes=[16, 64]"], "goes beyond the 48 training rows"),
        ("portability", ["study.sizes=[49]"], "goes beyond the 48 training rows"),
        ("forgetting", ["study.tasks={}"], "study.tasks is empty"),
        ("portability", ["study.tasks={}"], "study.tasks is empty"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_runs(
    tmp_path: Path, promise: str, changes: list[str], said: str
) -> None:
    path = save(tmp_path)
    with pytest.raises(UserError, match=said):
        study(load_recipe(path, changes), promise, command="")
    assert not (tmp_path / "out" / "runs").exists()


def test_a_task_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    for promise in ("forgetting", "portability"):
        with pytest.raises(UserError, match=r"study\.tasks\.third: .*missing\.csv.* no such file"):
            study(load_recipe(path, ["study.tasks.third.train=missing.csv"]), promise, command="")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["study.margin=1"], "study.margin"),
        (["study.sizes=[64, 16]"], "ascending"),
        (["study.draws=0"], "study.draws"),
        (["study.tasks={_a: {train: x.csv}}"], "letters, digits"),
        (["study.tasks={b: {trian: x.csv}}"], "trian"),
    ],
)
def test_a_wrong_study_is_a_mistake_of_the_recipe(tmp_path: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(save(tmp_path), changes)


def test_forgetting_of_a_generating_model_is_the_loss_of_general_text(tmp_path: Path) -> None:
    text = "training: {epochs: 1, batch_size: 8, learning_rate: 0.01}\ncompare: [full, lora]\n"
    path = save_recipe(tmp_path, text, decoder=True)
    (tmp_path / "general.txt").write_text("the day is good and the train was poor " * 400)
    with pytest.raises(UserError, match="probe is not given"):
        study(load_recipe(path), "forgetting", command="")
    probe = ["probe={text: general.txt, rise: 0.0001, length: 16}"]
    found, failures = study(load_recipe(path, probe), "forgetting", command="")
    assert not failures
    probes = {name: metrics(tmp_path / f"out/unguarded/{name}-s0")["probe"] for name in ("full", "lora")}
    assert [(row["before"], row["after"]) for row in found.rows] == [
        ([probe["before"]], [probe["after"]]) for probe in probes.values()
    ]


def test_patience_on_few_rows_lasts_as_long(tmp_path: Path) -> None:
    recipe = load_recipe(save(tmp_path), ["training.patience=2"])
    data = load_data(recipe.data, recipe.task)
    few = few_run(recipe, data, recipe.compare[0], 8, 0).recipe.training
    assert few.patience * 8 >= recipe.training.patience * len(data.train)
    assert few.max_steps == 4


def test_a_study_that_draws_rows_takes_no_drawn_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.rows=20 is given, and this study draws rows by itself"):
        study(load_recipe(save(tmp_path), ["data.rows=20"]), "little-data", command="")


def test_finished_runs_of_another_recipe_are_not_lost(tmp_path: Path) -> None:
    path = save(tmp_path)
    told: list[str] = []
    study(load_recipe(path, ["seeds=[0, 1]", "compare=[full, lora]"]), "parity", command="", tell=told.append)
    assert [bool(re.search(r"of 4: runs/.*, about .* left$", line)) for line in told] == [True, True, True, False]
    before = {file: file.read_bytes() for file in (tmp_path / "out" / "runs").glob("*/metrics.json")}
    with pytest.raises(UserError, match="runs/full-s0 and 3 more: finished runs of another recipe"):
        study(load_recipe(path, ["training.epochs=1", "compare=[full, lora]"]), "parity", command="")
    with pytest.raises(UserError, match="runs/full-s0 and 3 more: finished runs of another recipe"):
        compare(load_recipe(path, ["training.epochs=1", "seeds=[0, 1]", "compare=[full, lora]"]), command="")
    assert {file: file.read_bytes() for file in before} == before


def test_a_technique_that_fails_is_named_and_the_others_stay(tmp_path: Path) -> None:
    path = save(tmp_path, RECIPE.replace("lora]", "lora, {name: lora, targets: nowhere}]"))
    found, failures = study(load_recipe(path), "parity", command="")
    assert [row["technique"] for row in found.rows] == ["lora"]
    assert any("nowhere" in error for error in failures.values())


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_finding_is_told_in_full_at_any_width(width: int) -> None:
    found = Finding(
        title="What is forgotten?",
        answer="Nothing.",
        headings=("Technique", "Right after learning", "After 2 tasks", "Forgotten", "Disabled"),
        table=[
            ("Full fine-tuning", "98.8", "98.8", "0.0", "the base model is lost"),
            ("LoRA", "100.0", "100.0", "0.0", "the base model, to the bit"),
        ],
        chart=None,
        notes=(),
        rows=[],
    )
    console = Console(width=width)
    with console.capture() as told:
        for part in finding_lines(found, width):
            console.print(part, markup=False, soft_wrap=not isinstance(part, Table))
    for word in (*found.headings[1:], *(cell for row in found.table for cell in row)):
        assert all(part in told.get() for part in word.split())
