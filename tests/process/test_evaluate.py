"""Scores are those of the field's reference, whatever the batch size, and evaluation changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from smidgen.process.encoding import IGNORED, Encoded
from smidgen.process.evaluate import (
    evaluate,
    generate,
    longest_answer,
    loss_sum,
)
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.recipe import load_recipe
from smidgen.process.scores import calibration, class_scores, exact_match, rouge, span_scores
from smidgen.process.spans import Span
from tests.process.tiny import save_recipe


@pytest.fixture(scope="module", params=["classification", "token-classification", "generation"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder, task = tmp_path_factory.mktemp(request.param), request.param
    return prepare(load_recipe(save_recipe(folder, decoder=task == "generation", spans=task == "token-classification")))


def scores(job: Job, batch_size: int) -> dict:
    return evaluate(job.model, job.splits["train"], labels=job.labels, pad_id=0, batch_size=batch_size)


def test_the_loss_is_the_model_s_own(job: Job) -> None:
    rows = job.splits["train"]
    total, labels = 0.0, 0
    for row in rows:
        answers = torch.tensor([row.labels])
        if not job.labels:  # transformers' models move an answer's tokens themselves
            answers = torch.cat([torch.tensor([[IGNORED]]), answers[:, :-1]], 1)
        count = 1 if answers.dim() == 1 else int((answers != IGNORED).sum())
        with torch.no_grad():
            total += count * float(job.model.eval()(input_ids=torch.tensor([row.input_ids]), labels=answers).loss)
        labels += count
    assert scores(job, 8)["loss"] == pytest.approx(total / labels, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_scores_do_not_depend_on_the_batch_size(job: Job, batch_size: int) -> None:
    ours, theirs = scores(job, batch_size), scores(job, 8)
    assert ours.keys() == theirs.keys()
    for name in ("loss", "brier", "ece"):
        assert ours.pop(name, 0) == pytest.approx(theirs.pop(name, 0), rel=1e-5)
    if job.labels:
        assert ours | {"calibration": 0} == theirs | {"calibration": 0}
    else:
        assert ours["row_losses"] == pytest.approx(theirs["row_losses"], rel=1e-5)
        assert ours["row_tokens"] == theirs["row_tokens"]


def test_evaluation_leaves_the_model_as_it_was(job: Job) -> None:
    before = job.adapter.state()
    for training in (True, False):
        job.model.train(training)
        scores(job, 8)
        assert job.model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.adapter.state().items())
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_class_scores_are_scikit_learn_s() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (50,), generator=draw).tolist()
    found = torch.randint(3, (50,), generator=draw).tolist()
    ours = class_scores(found, targets, ["a", "b", "c"])
    assert ours["accuracy"] == accuracy_score(targets, found)
    assert ours["macro_f1"] == pytest.approx(f1_score(targets, found, average="macro"))
    assert sum(map(sum, ours["confusion"])) == 50
    assert ours["confusion"][targets[0]][found[0]] > 0  # rows are the true classes
    assert [entry["support"] for entry in ours["per_class"]] == [targets.count(label) for label in range(3)]


def test_a_class_that_no_row_has_does_not_lower_macro_f1() -> None:
    scores = class_scores([0, 1, 1, 0], [0, 1, 1, 0], ["a", "b", "never"])
    assert scores["macro_f1"] == 1.0
    assert scores["per_class"][2] == {"label": "never", "precision": None, "recall": None, "f1": None, "support": 0}


def test_span_scores_count_what_is_right_to_the_character() -> None:
    known = [[Span(0, 8, "a"), Span(9, 12, "b")], [Span(4, 9, "b")]]
    found = [[Span(0, 7, "a"), Span(9, 12, "b")], [Span(4, 9, "b")]]  # the first is too short
    scores = span_scores(found, known, ["a", "b"])
    assert (scores["row_hits"], scores["row_spans"]) == ([1, 1], [4, 2])
    assert scores["f1"] == scores["precision"] == scores["recall"] == pytest.approx(2 / 3)
    assert [entry["f1"] for entry in scores["per_class"]] == [0, 1]
    assert [entry["support"] for entry in scores["per_class"]] == [1, 2]
    assert scores["macro_f1"] == 0.5
    assert scores["f1"] == 2 * sum(scores["row_hits"]) / sum(scores["row_spans"])  # as a comparison draws it again


def test_calibration_is_how_far_probabilities_are_from_what_happens() -> None:
    random = np.random.default_rng(0)
    chances = random.dirichlet([0.5, 0.5, 0.5], 20_000).astype(np.float32)
    truth = np.array([random.choice(3, p=row / row.sum()) for row in chances.astype(float)])
    fair, bold = calibration(chances, truth), calibration(chances**3 / (chances**3).sum(1, keepdims=True), truth)
    assert fair["ece"] < 0.015 < 0.1 < bold["ece"]
    assert fair["brier"] == pytest.approx(((chances - np.eye(3)[truth]) ** 2).sum(1).mean(), rel=1e-4)
    assert fair["brier"] < bold["brier"]
    assert sum(entry["rows"] for entry in fair["calibration"]) == 20_000
    sure = calibration(np.eye(2, dtype=np.float32)[[0, 1, 1, 0]], np.array([0, 1, 1, 1]))
    assert sure == {
        "brier": 0.5,
        "ece": 0.25,
        "calibration": [{"rows": 4, "confidence": 1.0, "accuracy": 0.75}],
    }


def test_rouge_counts_words_pairs_and_the_longest_common_order() -> None:
    scores = rouge(["the cat sat", "no"], ["the cat lay down", "no"])
    assert scores == pytest.approx({"rouge_1": (4 / 7 + 1) / 2, "rouge_2": (2 / 5 + 0) / 2, "rouge_l": (4 / 7 + 1) / 2})


@pytest.mark.parametrize(
    "text",
    [
        "\u043f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
        "\u4f60\u597d\u4e16\u754c",
        "sch\u00f6ne Gr\u00fc\u00dfe",
        "\u092e\u0948\u0902 \u0939\u0942\u0901",
    ],
)
def test_rouge_knows_every_alphabet(text: str) -> None:
    assert rouge([text], [text]) == {"rouge_1": 1.0, "rouge_2": 1.0, "rouge_l": 1.0}
    assert rouge([text], ["x y"])["rouge_1"] == 0


@pytest.mark.parametrize(
    ("given", "answer", "shared"),
    [
        ("\u0930\u093e\u092e \u0915\u0940", "\u0930\u093e\u092e \u0915\u093e", 1 / 2),  # another vowel, another word
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("\u4f60\u597d ok_1", "\u4f60 ok_1", 4 / 5),
    ],
)
def test_marks_belong_to_their_words(given: str, answer: str, shared: float) -> None:
    assert rouge([given], [answer])["rouge_1"] == pytest.approx(shared)


def test_rows_without_any_span_are_said_to_score_nothing(tmp_path: Path) -> None:
    test = tmp_path / "none.jsonl"
    test.write_text("".join(json.dumps({"text": text, "spans": []}) + "\n" for text in ("fish", "a river")))
    job = prepare(load_recipe(save_recipe(tmp_path, spans=True), [f"data.test={test}"]))
    assert "No row of data.test has a span, so that its F1 is 0 whatever is found." in job.notes


def test_spans_that_were_cut_off_count_as_missed(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, spans=True)
    whole, cut = (prepare(load_recipe(path, [f"data.max_length={length}"])) for length in (40, 5))
    true = sum(len(example.spans or ()) for example in whole.data.test)
    for job in (whole, cut):
        assert sum(entry["support"] for entry in job.score(job.splits["test"])["per_class"]) == true
    assert not any("missed" in note for note in whole.notes)
    assert any("spans of data.test were cut off, or begin or end inside a token" in note for note in cut.notes)


def test_a_row_s_loss_is_the_sum_over_its_labels() -> None:
    logits = torch.randn(2, 4, 9)
    labels = torch.tensor([[3, 4, IGNORED, IGNORED], [IGNORED, IGNORED, 5, IGNORED]])
    logs = logits.log_softmax(-1)
    expected = [-(logs[0, 0, 3] + logs[0, 1, 4]), -logs[1, 2, 5]]
    torch.testing.assert_close(loss_sum(logits, labels), torch.stack(expected))


def test_rows_without_labels_have_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 4, 9, requires_grad=True)
    loss = loss_sum(logits, torch.full((2, 4), IGNORED))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return prepare(load_recipe(save_recipe(tmp_path_factory.mktemp("writer"), decoder=True)))


def prompts(job: Job) -> list[Encoded]:
    return [
        Encoded(row.input_ids[: row.labels.index(label) + 1], IGNORED)
        for row in job.splits["train"]
        if isinstance(row.labels, list)
        for label in [next(label for label in row.labels if label != IGNORED)]
    ]


def test_an_answer_does_not_depend_on_its_neighbours(writer: Job) -> None:
    rows = prompts(writer)
    assert len({len(row.input_ids) for row in rows}) > 2  # or nothing would be padded
    alone, together = (
        generate(writer.model, writer.tokenizer, rows, pad_id=0, max_new_tokens=6, batch_size=size) for size in (1, 16)
    )
    assert alone == together
    assert len({answer.text for answer in alone}) > 2


def test_exact_match_counts_the_expected_answers(writer: Job) -> None:
    wanted = ["fine good ", "poor bad", "poor bad"]
    assert exact_match(["fine good", "poor", "poor bad"], wanted) == 2 / 3
    assert longest_answer(writer.tokenizer, wanted) > 2  # the longest expected answer and the end of text fit
