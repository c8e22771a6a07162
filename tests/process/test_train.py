"""Training: the loss falls, the best epoch is kept, a stopped run goes on to the same bits, and mistakes are named."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from smidgen import FullFineTuning, HeadOnly, LoRA
from smidgen.errors import Interrupted, UserError
from smidgen.process import train as training
from smidgen.process.batches import collate
from smidgen.process.job import Job
from smidgen.process.models import gradient_checkpointing
from smidgen.process.opening import prepare, reopen
from smidgen.process.optimizer import rate_at
from smidgen.process.progress import Progress
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run
from smidgen.process.run_recipe import TrainingConfig
from tests.process.tiny import save_recipe

RECIPE = (
    "training: {epochs: 3, batch_size: 8, learning_rate: 0.01, head_learning_rate: 0.01, checkpoint_minutes: null}\n"
)


def job(path: Path, *changes: str) -> Job:
    return prepare(load_recipe(path, changes))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return save_recipe(tmp_path, RECIPE)


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path.parent / "out" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("technique", ["full", "lora", "houlsby", "prefix-tuning", "prompt-tuning", "p-tuning"])
def test_training_learns_and_leaves_its_results(recipe: Path, technique: str) -> None:
    started = job(recipe, f"technique={technique}", "training.epochs=5")
    for module in started.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of six steps an epoch, it moves the mean loss more than they do
    metrics = run(started, quiet=True)
    losses = [point["train_loss"] for point in metrics["curve"]]
    assert losses[-1] < losses[0]
    assert sorted(path.name for path in (recipe.parent / "out").iterdir()) == [
        "adapter",
        "log.jsonl",
        "metrics.json",
        "recipe.yaml",
    ]
    assert json.loads((recipe.parent / "out" / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 5 * 6
    assert metrics["tokens_per_second"] > 0
    assert len(log(recipe)) == 5 * 6 + 5


def test_a_decoder_learns_its_answers(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, RECIPE, decoder=True)
    changes = "training.epochs=6", "training.learning_rate=0.02", "training.head_learning_rate=null"
    metrics = run(job(path, *changes), quiet=True)
    assert metrics["curve"][-1]["validation_loss"] < 0.5 * metrics["curve"][0]["validation_loss"]
    assert metrics["test"]["exact_match"] > 0.5
    assert metrics["test"]["perplexity"] == pytest.approx(torch.tensor(metrics["test"]["loss"]).exp().item(), rel=1e-4)


def interrupted(started: Job, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until step `at`, when Ctrl-C comes."""
    real = training._check_finite

    def stop(loss: float, norm: float, step: int, rate: float) -> None:
        real(loss, norm, step, rate)
        if step + 2 == at:  # the signal is looked at before a step is taken
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_check_finite", stop)
        with pytest.raises(Interrupted, match=f"Stopped after step {at} of 18.*--resume"):
            run(started, quiet=True)


@pytest.mark.parametrize("technique", ["lora", "{name: lora, dropout: 0.1}", "full", "{name: p-tuning, encoder: lstm}"])
@pytest.mark.parametrize("at", [3, 6, 14])
def test_a_resumed_run_ends_at_the_same_bits(
    tmp_path: Path, technique: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (save_recipe(tmp_path / name, RECIPE) for name in ("whole", "parts"))
    change = f"technique={technique}"
    straight = job(whole, change)
    expected = run(straight, quiet=True)
    interrupted(job(parts, change), at, monkeypatch)
    assert not (parts.parent / "out" / "metrics.json").exists()
    resumed = job(parts, change)
    torch.rand(7)  # whatever happened in the new process before does not matter
    metrics = run(resumed, resume=True, quiet=True)
    states = [done.adapter.state() for done in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert metrics["test"] == expected["test"]
    assert log(parts) == log(whole)
    assert [p["train_loss"] for p in metrics["curve"]] == [p["train_loss"] for p in expected["curve"]]
    assert not (parts.parent / "out" / "checkpoint").exists()


def test_a_checkpoint_by_steps_is_enough_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (save_recipe(tmp_path / name, RECIPE) for name in ("whole", "parts"))
    straight = job(whole)
    run(straight, quiet=True)
    real = training._check_finite

    def crash(loss: float, norm: float, step: int, rate: float) -> None:
        real(loss, norm, step, rate)
        if step == 11:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(training, "_check_finite", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(job(parts, "training.checkpoint_steps=4"), quiet=True)
    resumed = job(parts, "training.checkpoint_steps=4")
    run(resumed, resume=True, quiet=True)
    states = [done.adapter.state() for done in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert log(parts) == log(whole)


def test_an_unfinished_run_is_not_overwritten(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job(recipe), 3, monkeypatch)
    with pytest.raises(UserError, match="holds an unfinished run. Add --resume"):
        run(job(recipe), quiet=True)


def test_resuming_with_a_changed_recipe_names_the_change(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job(recipe), 3, monkeypatch)
    with pytest.raises(UserError, match="training.epochs was 3 and is 4"):
        run(job(recipe, "training.epochs=4"), resume=True, quiet=True)
    with pytest.raises(UserError, match="rank was 8 and is 4"):
        run(job(recipe, "technique={name: lora, rank: 4}"), resume=True, quiet=True)


def test_resuming_with_changed_rows_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job(recipe), 3, monkeypatch)
    rows = recipe.parent / "rows.csv"
    rows.write_text(rows.read_text().replace("day", "night"))
    with pytest.raises(UserError, match="The data have changed"):
        run(job(recipe), resume=True, quiet=True)


def test_a_finished_run_of_other_rows_is_not_replaced(recipe: Path) -> None:
    run(job(recipe), quiet=True)
    before = (recipe.parent / "out" / "metrics.json").read_bytes()
    run(job(recipe), quiet=True)  # of the same: made again
    rows = recipe.parent / "rows.csv"
    rows.write_text(rows.read_text().replace("day", "night"))
    with pytest.raises(UserError, match="holds a finished run of other rows"):
        run(job(recipe), quiet=True)
    assert json.loads((recipe.parent / "out" / "metrics.json").read_bytes())["data"] == json.loads(before)["data"]


def test_resuming_nothing_says_so(recipe: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume"):
        run(job(recipe), resume=True, quiet=True)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:50] + b"x" + data[51:], lambda data: b""],
    ids=["cut", "changed", "empty"],
)
def test_a_damaged_checkpoint_is_refused(recipe: Path, damage: object, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job(recipe), 3, monkeypatch)
    (path,) = (recipe.parent / "out" / "checkpoint").glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="cut short"):
        run(job(recipe), resume=True, quiet=True)


def test_the_best_epoch_is_kept(recipe: Path) -> None:
    done = job(recipe, "training.epochs=6", "training.learning_rate=0.3", "training.schedule=constant")
    metrics = run(done, quiet=True)
    scores = [point["validation_score"] for point in metrics["curve"]]
    best = [point for point in metrics["curve"] if point["validation_score"] == max(scores)]
    assert metrics["best_epoch"] == min(best, key=lambda point: point["validation_loss"])["epoch"]
    assert done.score(done.splits["validation"])["accuracy"] == max(scores)


def test_an_epoch_before_the_ranks_have_fallen_is_not_kept(recipe: Path) -> None:
    """At this rate the first epoch is the best, and has more than the rank that was asked for."""
    technique = "technique={name: adalora, rank: 2, start_rank: 4, interval: 1, learning_rate: 1e-9}"
    done = job(recipe, technique, "training.epochs=5", "training.head_learning_rate=1e-9", "training.patience=1")
    metrics = run(done, quiet=True)
    assert metrics["best_epoch"] == 4  # the first after 0.7 of the steps
    assert sum(delta.mask.sum() for delta in done.adapter.deltas[0]) == 2 * len(done.adapter.deltas[0])


def test_patience_ends_the_run_early(recipe: Path) -> None:
    metrics = run(job(recipe, "training.epochs=50", "training.learning_rate=1e-9", "training.patience=2"), quiet=True)
    assert len(metrics["curve"]) == 3  # the first is the best, and two more did not beat it


def test_max_steps_ends_the_run(recipe: Path) -> None:
    metrics = run(job(recipe, "training.max_steps=4"), quiet=True)
    assert metrics["steps"] == 4
    assert len(metrics["curve"]) == 1


def test_pieces_of_a_batch_give_the_gradients_of_the_whole(recipe: Path) -> None:
    changes = ["training.epochs=1", "technique={name: lora, learning_rate: 0.01}"]
    states = []
    ways = ["micro_batch_size=null", "micro_batch_size=3", "micro_batch_tokens=20", "gradient_checkpointing=true"]
    for number, change in enumerate(ways):
        started = job(recipe, *changes, f"training.{change}", f"output=out{number}")
        for module in started.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run(started, quiet=True)
        states.append(started.adapter.state())
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-3)


def test_a_loss_that_is_not_finite_names_the_rate(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"The loss was (nan|inf) at step \d+, with learning rate"):
        run(job(recipe, "technique=full", "training.learning_rate=1e30", "training.warmup=0"), quiet=True)


def test_too_little_memory_says_what_to_lower(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training, "backward", full)
    with pytest.raises(UserError, match="Lower training.micro_batch_size"):
        run(job(recipe), quiet=True)


def test_bf16_trains_fp32_parameters(recipe: Path) -> None:
    started = job(recipe, "training.precision=bf16")
    assert {parameter.dtype for parameter in started.adapter.parameters()} == {torch.float32}
    assert started.model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    metrics = run(started, quiet=True)
    assert metrics["curve"][-1]["train_loss"] < metrics["curve"][0]["train_loss"]
    opened = reopen(Path(started.recipe.output))  # whose head is not rounded to the model's bf16
    assert torch.equal(opened.model.classifier.weight, started.model.classifier.weight)
    assert opened.evaluate()["loss"] == metrics["test"]["loss"]


def test_a_tracker_that_is_not_installed_names_its_package(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(job(recipe, "training.tracker=wandb"), quiet=True)


@pytest.mark.parametrize("last", ["max_steps=4", "patience=1"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("out of order")])
def test_what_fails_after_the_last_step_loses_nothing(
    tmp_path: Path, last: str, failure: type[BaseException] | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["training.epochs=9", "training.learning_rate=1e-9", f"training.{last}"]
    whole, parts = (save_recipe(tmp_path / name, RECIPE) for name in ("whole", "parts"))
    expected = run(job(whole, *changes), quiet=True)
    with monkeypatch.context() as patched:
        patched.setattr(Job, "evaluate", lambda _: (_ for _ in ()).throw(failure))
        with pytest.raises(Interrupted if failure is KeyboardInterrupt else RuntimeError):
            run(job(parts, *changes), quiet=True)
    metrics = run(job(parts, *changes), resume=True, quiet=True)
    assert metrics["test"] == expected["test"]
    assert metrics["steps"] == expected["steps"]
    assert log(parts) == log(whole)


def test_ctrl_c_in_the_last_validation_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_recipe(tmp_path, RECIPE)
    real = Job.score

    def stop(self: Job, rows: list) -> dict:
        signal.raise_signal(signal.SIGINT)
        return real(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Job, "score", stop)
        with pytest.raises(Interrupted, match="Stopped after step 6 of 6"):
            run(job(path, "training.epochs=1"), quiet=True)
    assert run(job(path, "training.epochs=1"), resume=True, quiet=True)["steps"] == 6


def test_evaluation_takes_no_more_rows_at_once_than_training(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        "smidgen.process.evaluate.collate", lambda rows, *_: sizes.append(len(rows)) or collate(rows, 0)
    )
    run(job(recipe, "training.epochs=1", "training.micro_batch_size=2"), quiet=True)
    assert max(sizes) == 2


@pytest.mark.parametrize(("name", "given"), [("gradient", "old"), ("activation", "new")])
def test_gradient_checkpointing_has_two_names(name: str, given: str) -> None:
    """transformers 5.3 to 5.22 know the old one alone."""
    called = []
    methods = {f"{name}_checkpointing_{verb}": lambda verb=verb: called.append(verb) for verb in ("enable", "disable")}
    with gradient_checkpointing(SimpleNamespace(**methods), True):
        assert called == ["enable"]
    assert called == ["enable", "disable"]


def test_a_delta_without_a_gradient_is_the_user_s_to_mend(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reaches_the_head_alone(model: PreTrainedModel, *_: object) -> float:
        for parameter in model.classifier.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return 0.0

    monkeypatch.setattr(training, "backward", reaches_the_head_alone)
    with pytest.raises(UserError, match="got no gradient.*Choose other targets"):
        run(job(recipe), quiet=True)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_schedules_rise_and_fall(schedule: str, middle: float) -> None:
    config = TrainingConfig(schedule=schedule, warmup=0.1)
    rates = [rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(middle)
    assert all(0 < rate <= 1 for rate in rates)
    done = [(step - 10) / 90 for step in range(10, 100)]
    fall = {"linear": lambda d: 1 - d, "cosine": lambda d: math.cos(math.pi * d / 2) ** 2, "constant": lambda d: 1.0}
    assert rates[10:] == pytest.approx([fall[schedule](share) for share in done])


def test_a_gradient_is_cut_to_its_longest_norm(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = training.make_optimizer

    def noted(*args: Any) -> torch.optim.Optimizer:
        optimizer = real(*args)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        )
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", noted)
    metrics = run(job(recipe, "training.clip=0.01", "training.epochs=1"), quiet=True)
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    rows = job(recipe).splits["train"]
    assert metrics["tokens"] == sum(len(row.input_ids) for row in rows)


def test_a_checkpoint_is_due_after_its_minutes_and_those_after_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(training, "time", clock)
    started = job(recipe, "training.checkpoint_minutes=2.0")
    saver = training._Saver(started.recipe, "", started.adapter, torch.optim.SGD(started.adapter.parameters()))
    due = []
    for seconds in (119, 120, 121, 239, 240):
        now[0] = 1000.0 + seconds
        due.append(saver.is_due(1))
        if due[-1]:
            saver.last = clock.monotonic()
    assert due == [False, True, False, False, True]


def test_dropout_is_another_in_each_step_seed_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for process in (0, 1):
        monkeypatch.setattr(
            training.parallel, "this_process", lambda process=process: SimpleNamespace(process_index=process)
        )
        for seed, step in itertools.product((0, 1), (0, 1)):
            training._seed(seed, step)
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 8


def test_patience_is_of_whole_epochs_whatever_their_parts() -> None:
    for parts, last in ((1, 2), (5, 10)):
        assert not Progress(epoch=last).is_over(2, parts)
        assert Progress(epoch=last + 1).is_over(2, parts)


def test_the_rates_come_from_the_most_specific_place(recipe: Path) -> None:
    own, head = FullFineTuning.learning_rates["encoder"], FullFineTuning.head_learning_rate
    nothing = ("training.learning_rate=null", "training.head_learning_rate=null")
    assert job(recipe, "technique=full", *nothing).rates == ((own,), head)
    assert job(recipe, "technique=full", "training.head_learning_rate=null").rates == ((0.01,), head)
    assert job(recipe, "technique=full", "training.head_learning_rate=0.5").rates == ((0.01,), 0.5)
    assert job(recipe, "technique={name: full, learning_rate: 0.2}").rates == ((0.2,), 0.01)
    assert job(recipe, "technique={name: full, head_learning_rate: 0.3}").rates == ((0.01,), 0.3)
    alone = HeadOnly.learning_rates["encoder"]
    assert job(recipe, "technique=head", *nothing).rates == ((alone,), alone)
    assert job(recipe, "technique=head", "training.head_learning_rate=null").rates == ((0.01,), 0.01)
    both = "technique=[lora, {name: parallel, learning_rate: 0.2}]"
    assert job(recipe, both, *nothing).rates == ((LoRA.learning_rates["encoder"], 0.2), head)


def test_the_head_starts_the_same_whatever_the_technique(recipe: Path) -> None:
    heads = [job(recipe, f"technique={name}").adapter.state()["classifier.weight"] for name in ("lora", "full", "head")]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
