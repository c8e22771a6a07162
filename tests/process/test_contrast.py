"""Two runs are told apart where their rows do, called the same where they are, and neither where rows are too few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from smidgen.errors import UserError
from smidgen.process.contrast import Contrast, contrast

RECIPE = "model: m\ntask: {task}\ndata: {{train: a.csv}}\noutput: {output}\n"


def finished(folder: Path, test: dict[str, Any] | None, *, task: str = "classification", data: str = "same") -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"data": data, "test": test}))
    (folder / "recipe.yaml").write_text(RECIPE.format(task=task, output=folder))
    return folder


def right(*where: range, rows: int) -> dict[str, Any]:
    """The scores of a run that has these rows right."""
    predictions = np.zeros(rows, int)
    for part in where:
        predictions[list(part)] = 1
    return {"predictions": predictions.tolist(), "targets": [1] * rows, "accuracy": float(predictions.mean())}


def contrasted(folder: Path, first: dict[str, Any], second: dict[str, Any], **options: Any) -> Contrast:
    task = options.pop("task", "classification")
    runs = [finished(folder / name, test, task=task) for name, test in (("a", first), ("b", second))]
    return contrast(*runs, margin=options.pop("margin", 0.01))


def test_the_better_run_is_named_with_the_rows_that_say_so(tmp_path: Path) -> None:
    found = contrasted(tmp_path, right(range(900), rows=1000), right(range(20, 860), rows=1000))
    assert found.verdict == "better"
    assert found.difference == pytest.approx(0.06)
    assert found.interval[0] < 0.06 < found.interval[1]
    assert (found.only_first, found.only_second) == (60, 0)
    assert found.p == pytest.approx(binomtest(60, 60).pvalue)


def test_the_worse_run_is_named(tmp_path: Path) -> None:
    assert contrasted(tmp_path, right(range(700), rows=1000), right(range(900), rows=1000)).verdict == "worse"


def test_runs_within_the_margin_are_the_same_if_there_are_rows_enough(tmp_path: Path) -> None:
    many = right(range(9000), rows=10_000), right(range(20, 9010), rows=10_000)
    assert contrasted(tmp_path, *many).verdict == "same"
    few = right(range(90), rows=100), right(range(2, 91), rows=100)
    (tmp_path / "few").mkdir()
    assert contrasted(tmp_path / "few", *few).verdict == "open"
    (tmp_path / "wide").mkdir()
    assert contrasted(tmp_path / "wide", *few, margin=0.2).verdict == "same"


@pytest.mark.parametrize(("margin", "verdict"), [(0.012, "open"), (0.018, "same")])
def test_the_same_is_what_an_interval_of_90_percent_keeps_within_the_margin(
    margin: float, verdict: str, tmp_path: Path
) -> None:
    """50 rows against 50 of 1,000: half of the draws lie within 0.007, 90 % within 0.0165, 95 % within 0.0196."""
    found = contrasted(tmp_path, right(range(950), rows=1000), right(range(50, 1000), rows=1000), margin=margin)
    assert found.difference == 0
    assert found.verdict == verdict


def test_rows_of_which_none_differs_are_the_same_only_if_they_are_many(tmp_path: Path) -> None:
    for rows, verdict in ((3, "open"), (299, "open"), (300, "same")):
        (tmp_path / str(rows)).mkdir()
        same = right(range(rows), rows=rows)
        assert contrasted(tmp_path / str(rows), same, same).verdict == verdict


def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    losses = random.uniform(1, 3, 500)

    def scores(losses: np.ndarray) -> dict[str, Any]:
        return {"row_losses": losses.tolist(), "row_tokens": [4] * 500, "loss": float(losses.mean())}

    found = contrasted(tmp_path, scores(losses - 0.1), scores(losses), task="generation")
    assert (found.verdict, found.p) == ("better", None)
    assert found.difference == pytest.approx(-0.1)
    assert found.margin == pytest.approx(0.01 * losses.mean())


def test_other_rows_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    test = right(range(5), rows=10)
    first, second = finished(tmp_path / "a", test), finished(tmp_path / "b", test, data="other")
    with pytest.raises(UserError, match="different rows"):
        contrast(first, second, margin=0.01)
    with pytest.raises(UserError, match="is not the output folder of a finished"):
        contrast(first, tmp_path, margin=0.01)


def test_a_few_rows_that_differ_tell_no_runs_apart(tmp_path: Path) -> None:
    found = contrasted(tmp_path, right(range(500), rows=500), right(range(4, 500), rows=500), margin=0.001)
    assert found.verdict == "open"
    assert found.p == pytest.approx(0.125)
    assert found.interval[0] == 0.0


def test_a_pre_training_has_no_test(tmp_path: Path) -> None:
    tested, made = finished(tmp_path / "a", right(range(5), rows=10)), finished(tmp_path / "b", None)
    (made / "metrics.json").write_text(json.dumps({"data": "same", "after": {"loss": 1.0}}))
    with pytest.raises(UserError, match="b is not a run of `smidgen train`"):
        contrast(tested, made, margin=0.01)


def test_a_run_that_was_not_tested_is_refused(tmp_path: Path) -> None:
    tested, untested = finished(tmp_path / "a", right(range(5), rows=10)), finished(tmp_path / "b", None)
    with pytest.raises(UserError, match=r"b was not scored on the test split \(score_test: false\)"):
        contrast(tested, untested, margin=0.01)
