"""All seven steps of a recipe, each on what the one before has made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smidgen.errors import UserError
from smidgen.process.finding import Finding
from smidgen.process.recipe import load_recipe
from smidgen.process.steps import take_steps
from smidgen.process.technique import TechniqueSpec
from tests.process.tiny import WORDS, save_recipe

pytestmark = pytest.mark.usefixtures("runs_here")

SIZE = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}"
RECIPE = """\
training: {epochs: 1, batch_size: 8, learning_rate: 0.01}
seeds: [0, 1]
identify: {budget: 1k}
refine: {rounds: 1}
"""
PRETRAINING = f"""\
pretrain:
  model: {{type: bert, config: {SIZE}}}
  tokenizer: {{vocabulary: 300, lowercase: true}}
  corpus: {{train: text.txt, length: 16}}
  training: {{evaluations: 1, batch_size: 16}}
  output: out/pretraining
"""


def save(folder: Path, text: str) -> Path:
    path = save_recipe(folder, text)
    sentences = (f"the {WORDS[n % 26]} {WORDS[n % 37]} is {WORDS[n % 31]} and very {WORDS[n % 29]}" for n in range(800))
    (folder / "text.txt").write_text("\n".join(sentences))
    return path


@pytest.fixture(scope="module")
def taken(runs_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finding]]:
    path = save(tmp_path_factory.mktemp("steps"), RECIPE + PRETRAINING)
    path.write_text(path.read_text().replace("model: ./model", "model: ./out/pretraining/model", 1))
    found, failures = take_steps(load_recipe(path), command="smidgen process recipe.yaml")
    assert not failures
    return path, found


def test_every_step_has_its_section(taken: tuple[Path, dict[str, Finding]]) -> None:
    path, found = taken
    assert list(found) == ["pre-training", "data", "identification", "subset", "fine-tuning", "refinement"]
    page = (path.parent / "out" / "process.html").read_text()
    for step, own in found.items():
        assert f'<h2 id="{step}">{own.title}</h2>' in page
        assert own.answer


def test_what_is_refined_is_what_was_compared(taken: tuple[Path, dict[str, Finding]]) -> None:
    path, found = taken
    start = TechniqueSpec.parse(found["refinement"].rows[0]["entry"]).slug
    out = path.parent / "out"
    assert {folder.name for folder in (out / "runs").iterdir()} == {
        f"{s}-s{n}" for s in ("full", start) for n in (0, 1)
    }
    assert not list((out / "refine").glob(f"{start}-s*"))


def test_each_step_works_on_what_the_one_before_has_made(taken: tuple[Path, dict[str, Finding]]) -> None:
    path, found = taken
    output = path.parent / "out"
    metrics = json.loads((output / "pretraining/metrics.json").read_text())
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    refined = load_recipe(output / "refined.yaml")
    assert refined.model == str(output / "pretraining" / "model")
    assert refined.data.train == str(output / "splits" / "train.jsonl")
    subset = {row["place"]: row["rank"] for row in found["subset"].rows}
    assert 0 < sum(bool(rank) for rank in subset.values()) < len(subset)
    assert all(name in found["subset"].notes[0] for name, rank in subset.items() if not rank)
    start, change = found["refinement"].rows
    assert (start["change"], change["kept"]) == ("the start", change["interval"][0] > 0)
    [row] = found["fine-tuning"].rows
    assert row["technique"].startswith("lora")


def test_what_is_done_is_kept(taken: tuple[Path, dict[str, Finding]]) -> None:
    path, found = taken
    output = path.parent / "out"
    before = {file: file.stat().st_mtime_ns for file in output.rglob("metrics.json")}
    again, _ = take_steps(load_recipe(path), command="smidgen process recipe.yaml")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {step: own.answer for step, own in again.items()} == {step: own.answer for step, own in found.items()}


def test_a_pre_training_of_another_text_does_not_count(taken: tuple[Path, dict[str, Finding]]) -> None:
    path, _ = taken
    text = path.parent / "text.txt"
    before = text.read_text()
    try:
        text.write_text(before.replace("a", "b"))
        with pytest.raises(UserError, match="holds a finished run of other rows"):
            take_steps(load_recipe(path), command="")
        made = path.parent / "out" / "pretraining"
        assert sorted(file.name for file in made.iterdir()) == ["log.jsonl", "metrics.json", "model", "recipe.yaml"]
        text.unlink()  # what is gone is no other text
        assert take_steps(load_recipe(path), command="")[0]["pre-training"].answer
    finally:
        text.write_text(before)


def test_a_model_that_is_there_needs_no_pretraining_and_no_budget(tmp_path: Path) -> None:
    path = save(tmp_path, RECIPE.replace("identify: {budget: 1k}\n", "technique: {name: lora, rank: 2}\n"))
    found, _ = take_steps(load_recipe(path), command="")
    assert "which is pre-trained" in found["pre-training"].answer
    assert "LoRA is the recipe's" in found["subset"].answer
    assert load_recipe(tmp_path / "out" / "refined.yaml").technique.name.startswith("lora")


def test_a_model_that_the_pretraining_does_not_make_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, RECIPE + PRETRAINING)
    with pytest.raises(UserError, match="is not what pretrain makes, which is .*out/pretraining/model"):
        load_recipe(path)


def test_a_mistake_in_the_pretraining_is_named_with_the_others(tmp_path: Path) -> None:
    path = save(tmp_path, RECIPE + PRETRAINING.replace("length: 16", "lenght: 16"))
    with pytest.raises(UserError, match=r"pretrain\.corpus\.lenght"):
        load_recipe(path)


def test_what_a_later_step_would_refuse_is_refused_first(tmp_path: Path) -> None:
    path = save(tmp_path, RECIPE)
    with pytest.raises(UserError, match="says nothing about chance"):
        take_steps(load_recipe(path, ["seeds=[0]"]), command="")
    with pytest.raises(UserError, match="refine changes ranks and layers"):
        take_steps(load_recipe(path, ["identify={}", "technique=head"]), command="")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "runs").mkdir(parents=True)
    with pytest.raises(UserError, match="holds runs of another command"):
        take_steps(load_recipe(path), command="")


def test_other_data_than_those_of_the_kept_splits_are_refused(taken: tuple[Path, dict[str, Finding]]) -> None:
    with pytest.raises(UserError, match="holds splits of other data"):
        take_steps(load_recipe(taken[0], ["data.seed=1"]), command="")
