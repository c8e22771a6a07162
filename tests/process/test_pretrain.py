"""Pre-training: perplexity falls, a stopped run goes on to the same bits, the result is a model like any other."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file

from smidgen.errors import Interrupted, UserError
from smidgen.process import train as training
from smidgen.process.opening import reopen
from smidgen.process.pretrain import SCRATCH, Pretraining, prepare, pretrain, run
from smidgen.process.pretrain_recipe import load_pretrain_recipe
from tests.process.tiny import save_model

SMALL = (
    "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 64"
)
NEW = {
    "masked": f"model: {{type: bert, config: {{{SMALL}}}}}\ntokenizer: {{vocabulary: 275}}\n",
    "causal": f"model: {{type: llama, config: {{{SMALL}}}}}\ntokenizer: {{vocabulary: 275}}\n",
}
REST = """
corpus: {train: texts, length: 16, validation_share: 0.1}
training: {epochs: 2, batch_size: 8, learning_rate: 0.01, evaluations: 2, checkpoint_minutes: null}
output: out
"""


def corpus(folder: Path) -> None:
    """Sentences in which every other word says what comes next."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for name in "ab":
        pairs = draw.integers(0, 20, 1500)
        (folder / f"{name}.txt").write_text(" ".join(f"name{pair} follows{pair}." for pair in pairs))


@pytest.fixture(params=NEW)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    corpus(tmp_path / "texts")
    path = tmp_path / "recipe.yaml"
    path.write_text(NEW[str(request.param)] + REST)
    return path


def job(path: Path, *changes: str, resume: bool = False) -> Pretraining:
    return prepare(load_pretrain_recipe(path, changes), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def interrupted(path: Path, step: int, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
    """Train until a step, when Ctrl-C comes."""
    real = training._check_finite

    def stop(loss: float, norm: float, done: int, rate: float) -> None:
        real(loss, norm, done, rate)
        if done + 2 == step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_check_finite", stop)
        with pytest.raises(Interrupted, match=f"Stopped after step {step} .*smidgen pretrain .* --resume"):
            run(job(path, *changes), quiet=True)


def test_perplexity_falls_and_the_best_weights_are_a_model(recipe: Path) -> None:
    metrics = run(job(recipe), quiet=True)
    folder = recipe.parent / "out"
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"] / 3
    assert metrics["after"]["perplexity"] == pytest.approx(math.exp(metrics["after"]["loss"]))
    assert [point["epoch"] for point in metrics["curve"]] == [0.5, 1, 1.5, 2]
    assert metrics["after"]["loss"] == min(point["validation_loss"] for point in metrics["curve"])
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "metrics.json", "model", "recipe.yaml"]
    kind = transformers.AutoModelForMaskedLM if metrics["objective"] == "masked" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    given = [tokenizer(f"name7 follows7. name{digit} follows", return_tensors="pt")["input_ids"] for digit in range(10)]
    with torch.no_grad():
        logits = torch.cat([model(tokens).logits[:, -1] for tokens in given])
    if metrics["objective"] == "causal":  # the name's own digit is likelier than another one's
        chances = logits.softmax(-1)[:, digits]
        assert chances.diagonal().mean() > 1.5 * chances.mean()


def test_a_stopped_run_goes_on_to_the_same_weights(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(job(recipe, "output=whole"), quiet=True)
    interrupted(recipe, 30, monkeypatch)
    with pytest.raises(UserError, match="holds an unfinished run. Add --resume"):
        job(recipe)
    resumed = run(job(recipe, resume=True), resume=True, quiet=True)
    for field in ("curve", "before", "after", "steps", "tokens"):
        assert untimed(resumed[field]) == untimed(whole[field])
    expected = weights(recipe.parent / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(recipe.parent / "out").items())


def untimed(value: object) -> object:
    """A value of the metrics without the seconds in it."""
    if isinstance(value, list):
        return list(map(untimed, value))
    return {name: own for name, own in value.items() if name != "seconds"} if isinstance(value, dict) else value


def test_a_text_that_changed_while_the_run_was_stopped_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, 5, monkeypatch)
    text = recipe.parent / "texts" / "a.txt"
    text.write_text(text.read_text().replace("name1 ", "name2 "))
    with pytest.raises(UserError, match="The data have changed"):
        run(job(recipe, resume=True), resume=True, quiet=True)


@pytest.mark.parametrize("technique", ["full", "lora"])
def test_a_model_goes_on_from_where_it_was(recipe: Path, technique: str) -> None:
    first = run(job(recipe), quiet=True)
    more = "training.max_steps=10", f"technique={technique}", "output=more", "training.learning_rate=0.003"
    path = recipe.parent / "more.yaml"
    path.write_text(f"model: out/model\n{REST}")
    before = weights(recipe.parent / "out")
    second = run(job(path, *more), quiet=True)
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-4)
    assert second["objective"] == first["objective"]
    after = weights(recipe.parent / "more")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    embeddings = {name for name in before if "embed" in name and "norm" not in name.lower()}
    assert changed
    assert not changed & embeddings if technique == "lora" else changed >= embeddings - {"position"}


def test_a_tokenizer_may_be_another_models(recipe: Path) -> None:
    run(job(recipe, "training.max_steps=1", "output=first"), quiet=True)
    made = job(recipe, f"tokenizer={{of: {recipe.parent}/first/model}}", "model.config.num_hidden_layers=1")
    theirs = transformers.AutoTokenizer.from_pretrained(recipe.parent / "first" / "model")
    assert made.tokenizer.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["corpus.train=nothing"], "names no text file"),
        (["corpus.validation=texts/a.txt"], "corpus.validation has a file that is trained on: .*a.txt"),
        (["corpus.length=65"], "corpus.length=65 is more than the 64 tokens that the model takes"),
        (["tokenizer.vocabulary=5000"], r"tokenizer.vocabulary=5000 is more than the text makes. It makes \d+ at most"),
        (["tokenizer.vocabulary=10"], r"tokenizer.vocabulary=10 does not hold the \d+ tokens that bytes alone make"),
        (["model.type=brt"], "model.type='brt' is no type of transformers. Did you mean"),
        (["model.type=t5", "model.config={}"], "t5 has an encoder and a decoder"),
        (["model.type=vit", "model.config={}"], "vit is no model of language"),
        (["model.config.hiden_size=3"], "model.config.hiden_size is no field of .*Did you mean 'hidden_size'"),
        (["model.config.vocab_size=3"], "model.config.vocab_size is given by the tokenizer"),
        (
            ["model.config.hidden_size=33"],
            "cannot be made for (masked|causal) language modelling|does not make a llama",
        ),
        (
            ["model={typ: bert}"],
            r"model.type is not given(.|\n)*model.typ is no field of a recipe. Did you mean type\?",
        ),
        (["model=3"], "model=3 must be the name of a model, or a new one: {type: bert"),
        (["technique=lora"], "technique=lora leaves a new model's random weights as they are"),
        (["training.head_learning_rate=0.1"], "head_learning_rate is that of a task's head, and what writes text has"),
        (["training.precision=int8"], "training.precision=int8 is for frozen weights, and these learn"),
        (["model=embedded:minilm"], "tokenizer is that of a new model"),
        (["corpus.validation_share=0.0001"], "The corpus has 0 tokens to validate on"),
    ],
)
def test_what_does_not_go_together_is_named(recipe: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        job(recipe, *changes)
    assert not (recipe.parent / "out").exists()


def test_a_technique_that_is_no_change_of_weights_is_refused(recipe: Path) -> None:
    run(job(recipe, "training.max_steps=1"), quiet=True)
    path = recipe.parent / "more.yaml"
    path.write_text(f"model: out/model\n{REST}")
    with pytest.raises(UserError, match="Houlsby adapter cannot be merged into the weights"):
        job(path, "technique=houlsby", "output=more")


def test_what_a_user_has_in_the_output_folder_stays(recipe: Path) -> None:
    own = [recipe.parent / "work" / name / "mine.txt" for name in ("tokens", "tokenizer", "checkpoint")]
    for file in own:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    with pytest.raises(UserError, match="names no text file"):
        job(recipe, "output=work", "corpus.train=nothing")
    assert all(file.read_text() == "mine" for file in own)


def test_a_finished_run_is_not_prepared_again(recipe: Path) -> None:
    run(job(recipe, "training.max_steps=1"), quiet=True)
    with pytest.raises(UserError, match="is finished; there is nothing left to resume"):
        job(recipe, "training.max_steps=1", resume=True)
    assert not (recipe.parent / "out" / SCRATCH).exists()


def test_the_other_objective_is_refused(recipe: Path) -> None:
    made = job(recipe, "output=other").objective
    other = "causal" if made == "masked" else "masked"
    with pytest.raises(UserError, match=f"objective={other}: .* Its objective is {made}"):
        job(recipe, f"objective={other}")


def test_a_weight_that_is_tied_is_refused_before_the_training(recipe: Path) -> None:
    run(job(recipe, "training.max_steps=1"), quiet=True)
    path = recipe.parent / "more.yaml"
    path.write_text(f"model: out/model\n{REST}")
    head = "cls.predictions.decoder" if "bert" in recipe.read_text() else None
    if head is None:
        pytest.skip("Llama's are not tied")
    with pytest.raises(UserError, match="weight is tied to another layer's"):
        job(path, f"technique={{name: lora, targets: {head}}}", "output=more")


def test_a_head_that_is_new_is_not_left_at_random(recipe: Path) -> None:
    save_model(recipe.parent / "headless")
    path = recipe.parent / "more.yaml"
    path.write_text(f"model: ./headless\n{REST}")
    with pytest.raises(UserError, match=r"would leave .* head for masked language modelling at random"):
        job(path, "technique=lora", "output=more")


def test_a_model_of_a_user_is_not_replaced_and_nothing_is_resumed_from_nothing(recipe: Path) -> None:
    (recipe.parent / "own" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a model of your own"):
        job(recipe, "output=own")
    with pytest.raises(UserError, match="There is no checkpoint to resume"):
        job(recipe, resume=True)
    assert not (recipe.parent / "out").exists()


def test_an_empty_corpus_is_refused(recipe: Path) -> None:
    for file in (recipe.parent / "texts").iterdir():
        file.write_text(" \n")
    with pytest.raises(UserError, match=r"is more than the text makes|to train on, which make no block"):
        job(recipe)


def test_two_pretrainings_of_one_folder_are_refused(recipe: Path) -> None:
    (recipe.parent / "out").mkdir()
    with FileLock(recipe.parent / "out" / ".lock"), pytest.raises(UserError, match="Another smidgen is at work in"):
        pretrain(load_pretrain_recipe(recipe), quiet=True)


def test_a_pretraining_that_cannot_begin_leaves_nothing(recipe: Path) -> None:
    with pytest.raises(UserError, match="names no text file"):
        pretrain(load_pretrain_recipe(recipe, ["corpus.train=[nothing.txt]"]), quiet=True)
    assert not (recipe.parent / "out").exists()


def test_what_it_writes_is_no_run_of_an_adapter(recipe: Path) -> None:
    pretrain(load_pretrain_recipe(recipe, ["training.max_steps=1"]), quiet=True)
    with pytest.raises(UserError, match=r"holds a model and no adapter.*model: .*out/model"):
        reopen(recipe.parent / "out")


def test_a_tokenizer_that_is_there_has_its_own_vocabulary(recipe: Path) -> None:
    with pytest.raises(UserError, match="vocabulary and lowercase are its own"):
        load_pretrain_recipe(recipe, ["tokenizer={of: embedded:minilm, vocabulary: 100}"])
