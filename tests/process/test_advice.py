"""The advice follows from the numbers, whichever way they fall."""

from __future__ import annotations

from typing import Any

import pytest

from smidgen.process.advice import advise


def row(name: str, score: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": name.title(),
        "status": "done",
        "validation": more.pop("validation", score),
        "score": score,
        "difference": more.pop("difference", None),
        "difference_low": more.pop("low", None),
        "difference_high": more.pop("high", None),
        "trained": more.pop("trained", 1000),
        "share": 0.01,
        "disk_bytes": more.pop("disk", 1_000_000),
        **more,
    }


FULL = row("full", 0.90, disk=90_000_000)


def test_the_best_within_a_point_is_recommended_with_its_difference_and_cost() -> None:
    rows = [FULL, row("lora", 0.895, difference=-0.005, low=-0.02, high=0.01), row("head", 0.70, difference=-0.20)]
    name, words = advise(rows, "accuracy", "full", test_rows=1000, seeds=3)
    assert name == "lora"
    assert "Use Lora, the best on the validation rows: accuracy 89.5 % on the test rows, 0.5 below full" in words
    assert "cannot tell the two apart" in words
    assert "1.0 % of the parameters and takes 1 MB a task" in words


def test_a_difference_that_the_rows_show_is_said() -> None:
    _, words = advise(
        [FULL, row("lora", 0.92, difference=0.02, low=0.01, high=0.03)], "accuracy", "full", test_rows=1000, seeds=3
    )
    assert "2.0 above full fine-tuning" in words
    assert "tell the two apart" in words
    assert "cannot" not in words


def test_one_seed_says_nothing_of_another() -> None:
    rows = [FULL, row("lora", 0.92, difference=0.02, low=0.01, high=0.03)]
    one, three = (advise(rows, "accuracy", "full", test_rows=1000, seeds=seeds)[1] for seeds in (1, 3))
    assert "the test rows tell the two apart" in one
    assert "This is one seed" in one
    assert "the test rows and seeds tell the two apart" in three
    assert "one seed" not in three


def test_full_fine_tuning_that_failed_is_not_asked_for() -> None:
    failed = {"name": "full", "title": "Full fine-tuning", "status": "failed"}
    _, words = advise([failed, row("lora", 0.8)], "accuracy", "full", test_rows=1000, seeds=1)
    assert "Add full" not in words
    assert "Not compared, since it failed: Full fine-tuning." in words


def test_a_much_smaller_one_within_a_point_is_named_too() -> None:
    rows = [FULL, row("lora", 0.90, difference=0.0), row("prompt", 0.893, difference=-0.007, disk=30_000)]
    name, words = advise(rows, "accuracy", "full", test_rows=1000, seeds=3)
    assert name == "lora"
    assert "the same as full fine-tuning" in words
    assert "The smallest within 1 point of full fine-tuning there is Prompt: accuracy 89.3 %, 30 kB a task." in words


def test_a_test_split_that_cannot_show_a_point_is_said_to_be_too_small() -> None:
    rows = [FULL, row("lora", 0.90, difference=0.0, low=0.0, high=0.0)]
    _, words = advise(rows, "accuracy", "full", test_rows=40, seeds=3)
    assert words.endswith("One answer counts for 2.5 points: 40 test rows are too few to see a difference of 1.")
    assert "too few" not in advise(rows, "accuracy", "full", test_rows=100, seeds=3)[1]


def test_nothing_within_a_point_recommends_nothing() -> None:
    name, words = advise([FULL, row("lora", 0.85, difference=-0.05)], "accuracy", "full", test_rows=1000, seeds=3)
    assert name is None
    assert "No technique comes within 1 point of full fine-tuning on the validation rows" in words
    assert "The nearest is Lora" in words


def test_a_point_is_within_a_point() -> None:
    full, lora = row("full", 0.87), row("lora", 0.86, difference=0.86 - 0.87)
    assert lora["difference"] < -0.01  # as floats have it
    assert advise([full, lora], "accuracy", "full", test_rows=1000, seeds=3)[0] == "lora"


def test_a_loss_is_better_when_lower() -> None:
    rows = [row("full", 2.0), row("lora", 1.9, difference=-0.1), row("head", 2.5, difference=0.5)]
    name, words = advise(rows, "loss", "full", test_rows=1000, seeds=3)
    assert name == "lora"
    assert "loss 1.900 on the test rows, 0.100 below full fine-tuning" in words


def test_the_validation_rows_choose_and_the_test_rows_judge() -> None:
    lucky = row("lora", 0.92, validation=0.89, difference=0.02)
    better = row("houlsby", 0.90, validation=0.91, difference=0.0)
    near = row("head", 0.895, validation=0.85, difference=-0.005)
    name, words = advise([FULL, lucky, better, near], "accuracy", "full", test_rows=1000, seeds=3)
    assert name == "houlsby"
    assert "accuracy 90.0 % on the test rows" in words
    assert advise([FULL, near], "accuracy", "full", test_rows=1000, seeds=3)[0] is None


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        ([row("lora", 0.8), row("head", 0.7)], "lora", "Add full to the compared"),
        ([FULL], None, "No technique but full fine-tuning was measured."),
        (
            [{"name": "lora", "title": "LoRA", "status": "failed"}],
            None,
            "measured. Not compared, since it failed: LoRA.",
        ),
    ],
)
def test_what_is_missing_is_said(rows: list[dict[str, Any]], name: str | None, words: str) -> None:
    chosen, said = advise(rows, "accuracy", "full", test_rows=1000, seeds=3)
    assert chosen == name
    assert words in said


def test_few_test_rows_are_said_where_nothing_is_recommended_too() -> None:
    name, words = advise([FULL, row("lora", 0.95, validation=0.80)], "accuracy", "full", test_rows=40, seeds=3)
    assert name is None
    assert "One answer counts for 2.5 points: 40 test rows are too few" in words
    assert "One answer" not in advise([FULL], "accuracy", "full", test_rows=40, seeds=3)[1]
