"""Answers come in the order of the rows, a batch at a time, and a bad row gets an error in its place."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from smidgen.errors import Interrupted, UserError
from smidgen.process import train as training
from smidgen.process.job import Job
from smidgen.process.opening import prepare, reopen
from smidgen.process.predict import predict, texts
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from smidgen.process.tables import BadRow
from tests.process.tiny import save_recipe

RECIPE = "training: {epochs: 4, batch_size: 8, learning_rate: 0.01, head_learning_rate: 0.01}\n"


@pytest.fixture(scope="module", params=["classification", "token-classification", "generation"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder, task = tmp_path_factory.mktemp(request.param), request.param
    text = RECIPE.replace(", head_learning_rate: 0.01", "") if task == "generation" else RECIPE
    path = save_recipe(folder, text, decoder=task == "generation", spans=task == "token-classification")
    run(prepare(load_recipe(path)), quiet=True)
    return reopen(folder / "out")


def test_answers_are_those_of_each_row_alone(job: Job) -> None:
    rows = [example.text for example in job.data.test + job.data.validation]
    alone = [next(predict(job, [row], batch_size=1)) for row in rows]
    together = list(predict(job, rows, batch_size=4))
    assert [answer["text"] for answer in together] == rows
    for ours, theirs in zip(together, alone, strict=True):
        assert {**ours, "score": 0} == {**theirs, "score": 0}
        assert ours.get("score", 0) == pytest.approx(theirs.get("score", 0), abs=1e-5)


def test_answers_say_what_evaluation_counts(job: Job) -> None:
    answers = list(predict(job, [example.text for example in job.data.test], batch_size=8))
    scores = job.evaluate()
    if job.recipe.task == "token-classification":
        found = [{(s["start"], s["end"], s["label"]) for s in answer["spans"]} for answer in answers]
        true = [set(example.spans or ()) for example in job.data.test]
        assert [len(ours & theirs) for ours, theirs in zip(found, true, strict=True)] == scores["row_hits"]
        assert [len(ours) + len(theirs) for ours, theirs in zip(found, true, strict=True)] == scores["row_spans"]
        assert scores["f1"] > 0.9  # or little would be found
        assert all(s["text"] == a["text"][s["start"] : s["end"]] for a in answers for s in a["spans"])
    elif job.labels:
        assert [answer["label"] for answer in answers] == [job.labels[index] for index in scores["predictions"]]
        assert all(1 / len(job.labels) <= answer["score"] <= 1 for answer in answers)
    else:
        right = [a["answer"] == e.answer for a, e in zip(answers, job.data.test, strict=True)]
        assert sum(right) / len(right) == scores["exact_match"]


@pytest.mark.parametrize("technique", ["lora", "{name: prompt-tuning, length: 9}"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_answer_has_room_behind_the_longest_prompt(tmp_path: Path, architecture: str, technique: str) -> None:
    path = save_recipe(tmp_path, "training: {epochs: 1}\n", decoder=True)
    if architecture == "gpt2":  # it has a table of positions, with no entry beyond them
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 60}
        config = transformers.GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    job = prepare(load_recipe(path, [f"technique={technique}"]))
    told: list[str] = []
    rows = ["the " * 200, "the day is"]
    answers = list(predict(job, rows, batch_size=2, tell=told.append))
    assert [answer["text"] for answer in answers] == rows
    assert told[0] == f"1 of 2 texts are longer than {job.room.prompt(128)} tokens; their ends were cut."
    told.clear()
    assert 9 <= job.room.answer(128) <= job.room.positions - job.room.prompt(128)
    (tmp_path / "long.csv").write_text("text,answer\n" + f"{'the ' * 200},{'fine ' * 100}\n")
    assert "exact_match" in job.evaluate(str(tmp_path / "long.csv"), tell=told.append)
    assert f"1 of 1 texts of {tmp_path}/long.csv are longer than {job.room.row} tokens" in told[0]
    most = job.room.answer(200)
    assert f"Answers are written up to {most} tokens" in told[-1]


@pytest.mark.parametrize("end", [0, 2])
def test_answers_that_were_cut_off_are_told(end: int, tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE.replace(", head_learning_rate: 0.01", ""), decoder=True)
    job = prepare(load_recipe(path))
    ends = torch.zeros(60)
    ends[end] = 1e4
    job.model.generation_config.eos_token_id = end
    told: list[str] = []
    rows = ["the day is", "the film is", "a book"]

    def head(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        """The first row's answer ends at once."""
        first = torch.zeros(len(logits), 1, 1)
        first[0] = 1.0
        return logits + first * ends - (1 - first) * ends

    handle = job.model.get_output_embeddings().register_forward_hook(head)
    answers = list(predict(job, rows, batch_size=3, max_new_tokens=5, tell=told.append))
    handle.remove()
    assert answers[0]["answer"] == ""
    assert told == ["2 of 3 answers were cut off after 5 tokens. --max-new-tokens allows more."]
    list(predict(job, rows, batch_size=3, max_new_tokens=500, tell=told.append))
    assert "The model takes no longer ones." in told[-1]


def test_skipped_rows_are_told(tmp_path: Path) -> None:
    job = prepare(load_recipe(save_recipe(tmp_path), ["data.bad_rows=skip"]))
    (tmp_path / "new.csv").write_text("text,label\na day,yes\n,no\na film,no\n")
    told: list[str] = []
    job.evaluate(str(tmp_path / "new.csv"), tell=told.append)
    assert len(told) == 1
    assert "1 of 3 rows can't be used (line 3: empty text); they were left out." in told[0]


def test_virtual_tokens_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    path = save_recipe(tmp_path)
    with pytest.raises(UserError, match="Prompt tuning's length=60 leaves no room for a text.* 48 positions of Bert"):
        prepare(load_recipe(path, ["technique={name: prompt-tuning, length: 60}"]))
    job = prepare(load_recipe(path, ["technique={name: prompt-tuning, length: 40}"]))
    job.tokenizer.model_max_length = 40
    with pytest.raises(UserError, match="Prompt tuning's length=40 leaves no room for a text.*takes 40 tokens. Lower"):
        job.plan()


def test_an_unfinished_run_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)
    run(prepare(load_recipe(path)), quiet=True)
    new = (tmp_path / "rows.csv").rename(tmp_path / "new.csv")
    assert reopen(tmp_path / "out").evaluate(str(new))["loss"] > 0  # a finished one is, without its own rows too
    new.rename(tmp_path / "rows.csv")

    def stop(*_: object) -> None:
        raise Interrupted("")

    monkeypatch.setattr(training, "backward", stop)
    with pytest.raises(Interrupted):
        run(prepare(load_recipe(path)), quiet=True)
    assert (tmp_path / "out" / "adapter").is_dir()
    with pytest.raises(UserError, match="has not finished. Train it to its end: smidgen train"):
        reopen(tmp_path / "out")


def test_a_recipe_of_the_user_s_own_is_not_replaced(tmp_path: Path) -> None:
    path = save_recipe(tmp_path)
    before = path.read_text()
    with pytest.raises(UserError, match="holds a recipe.yaml of your own.*another output"):
        run(prepare(load_recipe(path, ["output=."])), quiet=True)
    assert path.read_text() == before
    assert not (tmp_path / "adapter").exists()


def test_a_bad_row_gets_an_error_in_its_place(job: Job) -> None:
    rows = ["the day is", BadRow("line", 2, "empty text"), BadRow("line", 3, "broken UTF-8"), "a film"]
    told: list[str] = []
    answers = list(predict(job, rows, batch_size=2, tell=told.append))
    assert [answer.get("text") for answer in answers] == ["the day is", None, None, "a film"]
    assert told == ["2 of 4 rows have an error instead of an answer."]
    assert answers[1:3] == [{"error": "line 2: empty text"}, {"error": "line 3: broken UTF-8"}]
    json.dumps(answers)


def test_a_stream_without_end_is_answered_as_it_comes(job: Job) -> None:
    taken = itertools.count()

    def rows() -> Iterator[str]:
        while True:
            next(taken)
            yield "the day is"

    assert len(list(itertools.islice(predict(job, rows(), batch_size=3), 7))) == 7
    assert next(taken) == 9  # three batches, and no row more


def test_standard_input_is_a_text_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"one fine day\r\n\n  \nna\xc3\xafve\nbroken \xff\nlast"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    assert list(texts("-", "text")) == [
        "one fine day",
        BadRow("line", 2, "empty text"),
        BadRow("line", 3, "empty text"),
        "naïve",
        BadRow("line", 5, "broken UTF-8"),
        "last",
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.csv", 'id,text\n1,"a, b"\n2,\n3,c\n'),
        ("rows.tsv", "id\ttext\n1\ta, b\n2\t\n3\tc\n"),
        ("rows.jsonl", '{"text": "a, b"}\n{"text": ""}\n{"text": "c"}\n'),
    ],
)
def test_a_file_keeps_its_order_and_its_bad_rows(tmp_path: Path, name: str, data: str) -> None:
    (tmp_path / name).write_text(data)
    first, bad, last = texts(str(tmp_path / name), "text")
    assert (first, last) == ("a, b", "c")
    assert isinstance(bad, BadRow)
    assert bad.problem == "empty text"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        next(texts(str(tmp_path / "rows.csv"), "text"))


@pytest.mark.parametrize("technique", ["prompt-tuning", "p-tuning", "prefix-tuning", "unipelt", "hard-prompt"])
def test_spans_are_those_of_the_text_beside_virtual_tokens(tmp_path: Path, technique: str) -> None:
    job = prepare(load_recipe(save_recipe(tmp_path, spans=True), [f"technique={technique}"]))
    text = "the day is very fine good"
    (answer,) = predict(job, [text], batch_size=1)
    assert all(span["text"] == text[span["start"] : span["end"]] for span in answer["spans"])
    metrics = run(
        prepare(load_recipe(tmp_path / "recipe.yaml", [f"technique={technique}", "training.epochs=1"])), quiet=True
    )
    assert len(metrics["test"]["row_hits"]) == len(job.data.test)
