"""A run on tasks of lm-evaluation-harness: ours agree with a count by hand, and the base model stands beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from smidgen.errors import UserError
from smidgen.process.harness import harness_scores
from smidgen.process.job import Job
from smidgen.process.opening import prepare, reopen
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from tests.process.tiny import save_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # what the harness and its packages warn of is not ours

CHOICES = ["good", "bad"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("harness")
    path = save_recipe(folder, "training: {epochs: 2, learning_rate: 0.02}\n", decoder=True)
    run(prepare(load_recipe(path)), quiet=True)
    rows = [{"text": f"the {word} is very", "label": place % 2} for place, word in enumerate("abcdefgh")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "pairs.yaml").write_text(
        "task: pairs\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        f'doc_to_text: "{{{{text}}}}"\ndoc_to_choice: {CHOICES}\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return reopen(folder / "out")


def accuracy_by_hand(job: Job, folder: Path) -> float:
    """The share of rows whose true ending is the likelier one."""
    right = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        chances = []
        for choice in CHOICES:
            tokens = job.tokenizer(f"{row['text']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                chances.append(float(job.model(tokens).logits[0, -2].log_softmax(-1)[tokens[0, -1]]))
        right.append(max((0, 1), key=lambda place: chances[place]) == row["label"])
    return sum(right) / len(right)


def test_the_scores_are_those_of_a_count_by_hand_with_the_adapter_and_without(job: Job) -> None:
    folder = Path(job.recipe.output).parent
    [score] = harness_scores(job, ["pairs"], folder=folder / "tasks", limit=None)
    assert (score.task, score.metric) == ("pairs", "acc")
    assert score.value == pytest.approx(accuracy_by_hand(job, folder))
    with job.adapter.disabled():
        assert score.base == pytest.approx(accuracy_by_hand(job, folder))
    assert score.error is not None


def test_an_unknown_task_is_refused(job: Job) -> None:
    with pytest.raises(UserError, match=r"'hellaswagg' is no task of the harness. Did you mean 'hellaswag'"):
        harness_scores(job, ["hellaswagg"], folder=None, limit=1)


def test_a_run_that_does_not_generate_is_refused(tmp_path: Path) -> None:
    path = save_recipe(tmp_path)
    with pytest.raises(UserError, match="this run is of task=classification"):
        harness_scores(prepare(load_recipe(path)), ["pairs"], folder=None, limit=1)


def test_without_the_package_its_extra_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install lm-eval"):
        harness_scores(job, ["pairs"], folder=None, limit=1)
