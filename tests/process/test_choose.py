"""A search by successive halving: it keeps to its budget, goes on after a stop, and looks at the test split once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smidgen import METHODS
from smidgen.errors import Interrupted, UserError
from smidgen.process import search, trainer
from smidgen.process.candidates import candidates
from smidgen.process.choose import _winner, choose
from smidgen.process.data import load_data
from smidgen.process.opening import reopen
from smidgen.process.recipe import load_recipe
from smidgen.process.runs import Run
from tests.process.tiny import save_recipe, train_here

pytestmark = pytest.mark.usefixtures("runs_here")

RECIPE = """\
training: {epochs: 3, batch_size: 8}
compare: [full, head, {name: lora, targets: query}]
choose: {trials: 9}
"""


def result(output: Path) -> dict[str, Any]:
    written = json.loads((output / "choose.json").read_text())
    return {**written["choice"], "trials": written["rows"]}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("choose/*/metrics.json"))]


@pytest.fixture(scope="module")
def chosen(runs_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = save_recipe(tmp_path_factory.mktemp("choose"), RECIPE)
    choose(load_recipe(path), command="")
    return path, result(path.parent / "out")


def test_a_third_goes_on_and_a_third_of_those_to_the_end(chosen: tuple[Path, dict[str, Any]]) -> None:
    _, made = chosen
    reached = [len(trial["validation"]) for trial in made["trials"]]
    assert sorted(reached, reverse=True) == [3, 2, 2, 1, 1, 1, 1, 1, 1]
    assert made["tried"] == 9
    steps = {run["steps"] for run in metrics(chosen[0].parent / "out")}
    assert steps == {2, 6, 18}
    first = [trial["validation"][0] for trial in made["trials"]]
    went_on = [trial["validation"][0] for trial in made["trials"] if len(trial["validation"]) > 1]
    assert sorted(went_on) == sorted(first)[-3:]
    [winner] = [trial for trial in made["trials"] if len(trial["validation"]) == 3]
    assert (winner["entry"], winner["validation"][-1]) == (made["entry"], made["validation"])


def test_the_defaults_come_first(chosen: tuple[Path, dict[str, Any]]) -> None:
    entries = [trial["entry"] for trial in chosen[1]["trials"][:3]]
    assert [entry["name"] for entry in entries] == ["full", "head", "lora"]
    assert [entry["learning_rate"] for entry in entries] == [
        METHODS[entry["name"]].learning_rates["encoder"] for entry in entries
    ]
    assert entries[2]["rank"] == 8


def test_the_test_split_is_looked_at_once_at_the_end(chosen: tuple[Path, dict[str, Any]]) -> None:
    path, made = chosen
    assert all(run["test"] is None for run in metrics(path.parent / "out"))
    scored = list((path.parent / "out" / "choose").glob("*/test.json"))
    assert len(scored) == made["tests"] == 1
    assert reopen(scored[0].parent).evaluate()["accuracy"] == made["test"]["accuracy"]


def test_the_recipe_that_is_written_trains_the_choice(chosen: tuple[Path, dict[str, Any]]) -> None:
    path, made = chosen
    recipe = load_recipe(path.parent / "out" / "chosen.yaml")
    assert recipe.technique.written() == made["entry"]
    assert recipe.score_test
    [run] = train_here_once(Run(recipe.technique, recipe))
    assert run["curve"][run["best_epoch"] - 1]["validation_score"] == made["validation"]


def train_here_once(run: Run) -> list[dict[str, Any]]:
    train_here([run], ended=lambda run, error: None)
    return [json.loads((run.folder / "metrics.json").read_text())]


def test_a_search_that_is_done_measures_nothing_again(chosen: tuple[Path, dict[str, Any]]) -> None:
    path, made = chosen
    files = {file: file.stat().st_mtime_ns for file in (path.parent / "out" / "choose").glob("*/*.json")}
    choose(load_recipe(path), command="")
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert result(path.parent / "out") == made


def test_a_search_that_was_stopped_goes_on_to_as_many_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)

    def stopped(runs: list[Run], **arguments: Any) -> list[Run]:
        train_here(runs[:5], **arguments)
        return runs[5:]

    recipe = load_recipe(path)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "execute", stopped)
        with pytest.raises(Interrupted, match="Go on with the same command: again"):
            choose(recipe, command="again")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "choose").glob("*/metrics.json")}
    assert len(before) == 5
    choice = choose(recipe, command="again")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert choice.tried == 9
    more = choose(load_recipe(path, ["choose.trials=12"]), command="again")
    assert more.tried == 12


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    script = (
        "from smidgen.process import trainer; from smidgen.process.choose import choose; "
        "from smidgen.process.recipe import load_recipe; from tests.process.tiny import train_here; "
        f"trainer.execute = train_here; print(choose(load_recipe({str(path)!r}), command='').entry)"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    made = result(tmp_path / "out")
    assert made["tried"] == 9
    assert len(list((tmp_path / "out" / "choose").glob("*/test.json"))) == 1


def test_the_budget_leaves_out_what_trains_more(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    recipe = load_recipe(path)
    every = candidates(recipe, load_data(recipe.data, recipe.task))
    assert list(every) == ["full", "head", "lora-targets-query"]
    lora = every["lora-targets-query"]
    assert set(lora.sizes) == {4, 8, 16, 32}
    assert lora.sizes[8] - lora.sizes[4] == 2 * 4 * (32 + 32)  # two layers, A and B, four ranks more
    limited = load_recipe(path, [f"choose.trained={lora.sizes[8]}"])
    found = candidates(limited, load_data(recipe.data, recipe.task))
    assert {slug: set(own.sizes) for slug, own in found.items()} == {"head": {0}, "lora-targets-query": {4, 8}}


def test_a_budget_that_nothing_meets_names_the_smallest(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    with pytest.raises(UserError, match=r"choose.trained=10 is met by nothing.*smallest is head, which trains 1,122"):
        choose(load_recipe(path, ["choose.trained=10"]), command="")
    with pytest.raises(UserError, match="choose.trials=2 is below the 3 entries of compare"):
        choose(load_recipe(path, ["choose.trials=2"]), command="")
    with pytest.raises(UserError, match=r"choose.memory of 10 B is met by nothing in compare. The least was [\d.]+ GB"):
        choose(load_recipe(path, ["choose.memory=10", "choose.trials=3"]), command="")


def test_what_takes_too_much_memory_leaves_its_place_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)
    real = trainer.Trainer.train

    def measured(self: trainer.Trainer, runs: list[Run]) -> list[dict[str, Any] | None]:
        """Full fine-tuning is the best, and takes twice the memory."""
        return [
            {
                **(metrics or {}),
                "peak_memory_bytes": 200 if run.spec.name == "full" else 100,
                "curve": [{"validation_score": 0.9 if run.spec.name == "full" else 0.5, "validation_loss": 1.0}],
                "best_epoch": 1,
            }
            for run, metrics in zip(runs, real(self, runs), strict=True)
        ]

    monkeypatch.setattr(trainer.Trainer, "train", measured)
    choice = choose(load_recipe(path, ["choose.memory=150"]), command="")
    assert choice.entry["name"] != "full"
    assert not choice.failures
    left_out = [trial["outside"] for trial in result(tmp_path / "out")["trials"] if trial["outside"]]
    assert left_out
    assert set(left_out) == {"it takes 200 B of memory"}
    with pytest.raises(UserError, match="holds a search of another recipe"):
        choose(load_recipe(path, ["choose.memory=1000"]), command="")


def test_entries_that_are_fixed_are_tried_once(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    fixed = "compare=[{name: head, learning_rate: 0.01}, {name: lora, rank: 2, learning_rate: 0.01}]"
    assert choose(load_recipe(path, [fixed]), command="").tried == 2


def test_no_entry_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "RATES", (1.0, 1.0))
    path = save_recipe(tmp_path, RECIPE.replace("[full, head, {name", "[{name"))
    choose(load_recipe(path, ["choose.trials=4"]), command="")
    assert {trial["entry"]["rank"] for trial in result(tmp_path / "out")["trials"]} == {4, 8, 16, 32}


def test_too_few_steps_to_tell_entries_apart_are_refused(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    with pytest.raises(UserError, match="The whole training has 4 steps, and a ninth of them tells nothing"):
        choose(load_recipe(path, ["training.max_steps=4"]), command="")


def test_minutes_end_the_search(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    choice = choose(load_recipe(path, ["choose.minutes=0.001", "choose.trials=1000"]), command="")
    assert choice.tried == 9  # the first round always starts


def test_minutes_do_not_end_a_search_whose_first_entries_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails says nothing about how long an entry takes; the tenth is tried as well."""
    real = trainer.Trainer.train

    def train(self: trainer.Trainer, runs: list[Run]) -> list[Any]:
        lost = [run for run in runs if run.spec.name == "lora"]
        self.failures.update({self.name_of(run): "broken" for run in lost})
        found = iter(real(self, [run for run in runs if run not in lost]))
        return [None if run in lost else next(found) for run in runs]

    monkeypatch.setattr(trainer.Trainer, "train", train)
    failing = ", ".join(f"{{name: lora, learning_rate: {n}.0e-3}}" for n in range(1, 10))
    path = save_recipe(tmp_path, RECIPE.replace("[full, head, {name: lora, targets: query}]", f"[{failing}, head]"))
    choice = choose(load_recipe(path, ["choose.minutes=10.0", "choose.trials=10"]), command="")
    assert set(choice.failures.values()) == {"broken"}
    assert (len(choice.failures), choice.tried) == (9, 10)


def test_what_failed_is_tried_again_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)
    with monkeypatch.context() as broken:

        def train(self: trainer.Trainer, runs: list[Run]) -> list[None]:
            self.failures.update({self.name_of(run): "No space is left." for run in runs})
            return [None] * len(runs)

        broken.setattr(trainer.Trainer, "train", train)
        with pytest.raises(UserError, match="No entry came to the end"):
            choose(load_recipe(path), command="")
    choice = choose(load_recipe(path), command="")
    assert (choice.tried, choice.failures) == (9, {})


def test_what_failed_is_not_forgotten_where_there_is_no_room_to_try_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = save_recipe(tmp_path, RECIPE), trainer.Trainer.train

    def train(self: trainer.Trainer, runs: list[Run]) -> list[Any]:
        lost = [run for run in runs if run.spec.name == "head"]
        self.failures.update({self.name_of(run): "broken" for run in lost})
        found = iter(real(self, [run for run in runs if run not in lost]))
        return [None if run in lost else next(found) for run in runs]

    with monkeypatch.context() as broken:
        broken.setattr(trainer.Trainer, "train", train)
        before = choose(load_recipe(path), command="")
    for _ in range(2):
        again = choose(load_recipe(path, ["choose.minutes=1e-9"]), command="")
        assert (again.tried, again.failures) == (before.tried, before.failures)
    assert set(before.failures.values()) == {"broken"}
    assert not choose(load_recipe(path), command="").failures


def test_a_file_of_ones_own_in_the_way_is_seen_before_anything_runs(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chosen.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"holds a chosen\.yaml of your own"):
        choose(load_recipe(path), command="")
    assert not (tmp_path / "out" / "choose").exists()


def test_a_search_of_another_recipe_is_refused(chosen: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="holds a search of another recipe"):
        choose(load_recipe(chosen[0], ["training.epochs=2"]), command="")


@pytest.mark.parametrize(("goal", "number"), [("best", 1), ("smallest", 2)])
def test_the_goal_decides(tmp_path: Path, goal: str, number: int) -> None:
    recipe = load_recipe(save_recipe(tmp_path, RECIPE), [f"choose.goal={goal}"])
    scores, trained = {0: 0.80, 1: 0.95, 2: 0.945, 3: 0.93}, {0: 10, 1: 1000, 2: 100, 3: 5}
    losses = dict.fromkeys(scores, 0.5)
    assert _winner(scores, losses, trained, recipe) == number


def test_a_point_is_within_a_point_and_a_loss_decides_between_equal_scores(tmp_path: Path) -> None:
    recipe = load_recipe(save_recipe(tmp_path, RECIPE), ["choose.goal=smallest"])
    assert _winner({0: 0.87, 1: 0.86}, {0: 0.5, 1: 0.5}, {0: 100, 1: 10}, recipe) == 1  # 0.87 - 0.86 is above 0.01
    recipe = load_recipe(save_recipe(tmp_path, RECIPE))
    assert _winner({0: 0.87, 1: 0.87}, {0: 0.4, 1: 0.5}, {0: 100, 1: 10}, recipe) == 0


def test_a_rate_and_a_size_that_are_given_stay(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE)
    recipe = load_recipe(path, ["compare=[{name: lora, rank: 2, learning_rate: 0.01}]"])
    [found] = candidates(recipe, load_data(recipe.data, recipe.task)).values()
    assert (found.rate, found.option, set(found.sizes)) == (None, None, {0})
