"""Amounts are read as a person writes them, and what is none is refused where it enters."""

from pathlib import Path

import pytest

from smidgen import UserError
from smidgen.process.amounts import amount
from smidgen.process.recipe import Recipe, load_recipe


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("100k", 100_000, "numbers"),
        ("1.5M", 1_500_000, "numbers"),
        ("250", 250, "numbers"),
        ("400kB", 400_000, "bytes"),
        ("2 GB", 2e9, "bytes"),
        ("8B", 8, "bytes"),
        ("90s", 90, "seconds"),
        (" 1.5 h ", 5400, "seconds"),
        ("10 min", 600, "seconds"),
    ],
)
def test_an_amount_is_numbers_bytes_or_seconds(text: str, value: float, unit: str) -> None:
    assert amount(text) == (value, unit)


@pytest.mark.parametrize(
    "text", ["", "many", "-3", "1.2.3k", "0", "5 TB", "0s", "-1min", "xs", "infs", "nan", "1" * 400]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be numbers, such as 100k"):
        amount(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: embedded:minilm\ndata: {train: embedded:tweets}\n")
    return path


def test_a_recipe_takes_them(path: Path) -> None:
    def read(*changes: str) -> Recipe:
        return load_recipe(path, changes)

    chosen = read("choose.trained=600k", "choose.memory=1.5GB", "identify.budget=250").choose
    assert (chosen.trained, chosen.memory) == (600_000, 1_500_000_000)
    assert read("choose.trained=600000").choose.trained == 600_000
    assert read("choose.trained=2.01M").choose.trained == 2_010_000
    assert read("identify.budget=250").identify.budget == "250"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("choose.trained=2GB", "choose.trained='2GB' must be numbers, such as 600000 or 600k."),
        ("choose.memory=much", "choose.memory='much' must be bytes, such as 2000000000 or 2GB."),
        ("choose.memory=0", "choose.memory=0 must be at least 1."),
        (
            "identify.budget=abc",
            "identify.budget='abc' must be numbers, such as 100k or 1.5M, bytes, as 400kB, or time",
        ),
    ],
)
def test_what_is_none_is_named_with_its_field(path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(path, [change])
    assert message in str(refused.value)
