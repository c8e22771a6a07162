"""The command line: help, exit codes, JSON, and a message instead of a traceback for every mistake of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from smidgen.cli import main
from tests.process.tiny import save_recipe

COMMANDS = (
    "demo",
    "data",
    "identify",
    "plan",
    "pretrain",
    "train",
    "evaluate",
    "predict",
    "compare",
    "merge",
    "export",
    "explain",
    "methods",
)


@dataclasses.dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def smidgen(folder: Path, *arguments: str, given: str = "") -> Ended:
    """Run a command in this process: starting a new one each time would take most of the tests' time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patched.chdir(folder)
        patched.setenv("COLUMNS", "100")
        patched.setattr(sys, "argv", ["smidgen", *arguments])
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode()), "utf-8"))
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Ended(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_recipe(folder, "training: {epochs: 2, batch_size: 8}\n")
    done = smidgen(folder, "train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "Trained  " in done.stdout
    assert "Accuracy" in done.stdout
    assert "epoch 2: training loss" in done.stderr
    return folder


def test_help_shows_every_command_and_examples(tmp_path: Path) -> None:
    shown = smidgen(tmp_path, "--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)
    for command in COMMANDS:
        assert "Example" in smidgen(tmp_path, command, "--help").stdout


def test_help_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic'}"
    code = f"import atexit, sys; atexit.register(lambda: print(sorted({heavy} & set(sys.modules))))\n"
    code += "sys.argv = ['smidgen', '--help']\nfrom smidgen.cli import main\nmain()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smidgen", "train", "nowhere.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "smidgen: There is no recipe nowhere.yaml.\n"


def test_the_version_is_said(tmp_path: Path) -> None:
    assert smidgen(tmp_path, "--version").stdout == "smidgen 0.1.0\n"


def test_plan_in_json(trained: Path) -> None:
    planned = json.loads(smidgen(trained, "plan", "recipe.yaml", "--json").stdout)
    assert planned["technique"] == "LoRA"
    assert planned["trainable"] > 0


def test_evaluate_repeats_the_run_s_own_scores(trained: Path) -> None:
    scores = json.loads(smidgen(trained, "evaluate", "out", "--json").stdout)
    assert scores == json.loads((trained / "out" / "metrics.json").read_text())["test"]
    again = json.loads(smidgen(trained, "evaluate", "out", "--data", "rows.csv", "--json").stdout)
    assert len(again["predictions"]) == 60
    assert "macro-F1" in smidgen(trained, "evaluate", "out").stdout


def test_predict_reads_a_file_or_standard_input(trained: Path) -> None:
    answers = [json.loads(line) for line in smidgen(trained, "predict", "out", "rows.csv").stdout.splitlines()]
    assert len(answers) == 60
    assert set(answers[0]) == {"text", "label", "score"}
    lines = smidgen(trained, "predict", "out", given="the day is good\n\nthe film is bad\n").stdout.splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [
        ["label", "score", "text"],
        ["error"],
        ["label", "score", "text"],
    ]


def test_merge_writes_a_model_that_transformers_loads(trained: Path) -> None:
    assert smidgen(trained, "merge", "out", "merged").returncode == 0
    expected = json.loads(smidgen(trained, "predict", "out", given="the day is good\n").stdout)
    found = transformers.pipeline("text-classification", str(trained / "merged"))("the day is good")[0]
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_several_processes_print_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for command in (["plan", "recipe.yaml", "--json"], ["evaluate", "out"], ["evaluate", "out", "--json"]):
        assert smidgen(trained, *command).stdout == ""
    assert smidgen(trained, "predict", "out", given="the day\n").stdout == ""


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, "training: {epochs: 1}\ndata: {train: rows.csv, template: '[INST] {text} [/INST]'}\n")
    path.write_text(path.read_text().replace("data: {train: rows.csv}\n", ""))
    rows = tmp_path / "rows.csv"
    text = rows.read_text().replace(",yes", ",[red]").replace(",no", ",[/bold]")
    rows.write_text(text + f"{' the [/INST] day' * 20},[red]\n one [/INST] day,[red]\n one [/INST] day,[/bold]\n")
    done = smidgen(tmp_path, "train", "recipe.yaml", "--set", 'output="[red]out"')
    assert done.returncode == 0, done.stderr
    assert "'one [/inst] day'" in " ".join(done.stdout.split())
    for words in ("\n[red]  ", "\n[/bold]", "as [red]", f"The adapter is in {tmp_path}/[red]out/adapter"):
        assert words in done.stdout


def test_what_is_left_out_or_cut_is_said_beside_the_answers(trained: Path) -> None:
    predicted = smidgen(trained, "predict", "out", given=f"{'the ' * 100}\na day\n")
    assert len(predicted.stdout.splitlines()) == 2
    assert predicted.stderr == "1 of 2 texts are longer than 48 tokens; their ends were cut.\n"
    (trained / "new.csv").write_text(f"text,label\n{'the ' * 100},yes\n")
    scored = smidgen(trained, "evaluate", "out", "--data", "new.csv", "--json")
    (trained / "new.csv").unlink()
    assert "1 of 1 texts of new.csv are longer than 48 tokens" in scored.stderr
    assert json.loads(scored.stdout)["targets"] == [1]


def test_a_comparison_says_what_was_cut(tmp_path: Path) -> None:
    save_recipe(tmp_path, "training: {epochs: 1}\ncompare: [head]\n")
    compared = smidgen(tmp_path, "compare", "recipe.yaml", "--set", "data.max_length=6", "--json")
    notes = json.loads(compared.stdout)["data"]["notes"]
    assert any("texts of data.train are longer than 6 tokens" in note for note in notes)
    assert all(note in compared.stderr for note in notes)


def test_the_demo_keeps_its_changes_and_no_recipe_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr("smidgen.cli.searches.compared", lambda recipe, command, as_json: commands.append(command))
    for _ in range(2):
        demo = smidgen(tmp_path, "demo", "--output", "my demo", "--set", "compare=[lora, head]")
        assert demo.returncode == 0, demo.stderr
    assert commands[1] == "smidgen demo --output 'my demo' --set 'compare=[lora, head]'"
    (tmp_path / "recipe.yaml").write_text("model: mine\n")
    refused = smidgen(tmp_path, "demo", "--output", ".")
    assert refused.returncode == 2
    assert "is not the demo's recipe" in refused.stderr
    assert (tmp_path / "recipe.yaml").read_text() == "model: mine\n"


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = smidgen(tmp_path, "demo", "--output", "file/x")
    assert failed.returncode == 2
    assert failed.stderr == "smidgen: file/x: Not a directory.\n"


def test_methods_lists_all_techniques(tmp_path: Path) -> None:
    listed = json.loads(smidgen(tmp_path, "methods", "--json").stdout)
    assert [entry["name"] for entry in listed][:3] == ["full", "head", "lora"]
    shown = smidgen(tmp_path, "methods").stdout
    assert "…" not in shown
    for entry in listed:
        assert all(f"{option}=" in shown for option in entry["options"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "There is no recipe nowhere.yaml"),
        (["train", "recipe.yaml", "--set", "technique=lorra"], "Did you mean 'lora'?"),
        (["train", "recipe.yaml", "--set", "training.epoch=2"], "Did you mean training.epochs"),
        (["train", "recipe.yaml", "--set", "training.epochs=0"], "training.epochs"),
        (["train", "recipe.yaml", "--set", "data.train=nowhere.csv"], "no such file"),
        (["train", "recipe.yaml", "--set", "data.text=txt"], "has no column 'txt'"),
        (["train", "recipe.yaml", "--set", "technique={name: lora, targets: q_proj}"], "matches no layer"),
        (["train", "recipe.yaml", "--set", "technique={name: lora, rank: 99}"], "above the size"),
        (["train", "recipe.yaml", "--set", "model=./nowhere"], "is not a folder with a model"),
        (["train", "recipe.yaml", "--set", "model=no/such-model"], "cannot be loaded"),
        (["train", "recipe.yaml", "--set", "data.max_length=4000"], "Lower it"),
        (["train", "recipe.yaml", "--resume", "--set", "output=fresh"], "no checkpoint to resume"),
        (["evaluate", "nowhere"], "not the output of"),
        (["predict", "nowhere"], "not the output of"),
        (["predict", "out", "nowhere.csv"], "no such file"),
        (["evaluate", "out", "--data", "model/config.json"], "ends in '.json'"),
        (["evaluate", "out", "--limit", "3"], "--tasks and --limit are for --harness"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(trained: Path, arguments: list[str], words: str) -> None:
    before = sorted(trained.rglob("*"))
    elsewhere = ["--set", "output=elsewhere"] if arguments[0] == "train" and "output=fresh" not in arguments else []
    failed = smidgen(trained, *arguments, *elsewhere)
    assert failed.returncode == 2, failed.stderr
    assert words in failed.stderr
    assert failed.stderr.startswith("smidgen: ")
    assert "Traceback" not in failed.stderr
    assert sorted(trained.rglob("*")) == before


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_recipe(tmp_path)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    failed = smidgen(tmp_path, "train", "recipe.yaml")
    assert failed.returncode == 2
    assert "has no tokenizer" in failed.stderr


def test_an_adapter_that_was_changed_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "out", tmp_path / "out")
    tensors = tmp_path / "out" / "adapter" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    failed = smidgen(tmp_path, "predict", "out", given="the day\n")
    assert failed.returncode == 2
    assert "cut short" in failed.stderr


def test_another_base_model_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "moved")
    model = transformers.AutoModel.from_pretrained(trained / "model")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.add_(1)
    recipe = tmp_path / "moved" / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained / "model"), str(tmp_path / "moved" / "model")))
    model.save_pretrained(tmp_path / "moved" / "model")
    failed = smidgen(tmp_path / "moved", "predict", "out", given="the day\n")
    assert failed.returncode == 2
    assert "was trained on other weights" in failed.stderr


def test_export_writes_an_adapter_that_peft_loads(trained: Path) -> None:
    done = smidgen(trained, "export", "out", "exported")
    assert done.returncode == 0
    assert "as peft has it." in " ".join(done.stdout.split())
    config = json.loads((trained / "exported" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")


def test_explain_shows_what_was_learned(trained: Path) -> None:
    done = smidgen(trained, "explain", "out", "--most", "2", "--picture", "learned.svg")
    assert done.returncode == 0
    assert "singular values of the update" in " ".join(done.stdout.split())
    assert (trained / "learned.svg").read_text().startswith("<svg")
    found = json.loads(smidgen(trained, "explain", "out", "--json").stdout)
    assert {"technique", "place", "about", "values"} == found[0].keys()


def test_techniques_that_cannot_be_merged_say_so(tmp_path: Path) -> None:
    save_recipe(tmp_path, "technique: houlsby\ntraining: {epochs: 1}\n")
    assert smidgen(tmp_path, "train", "recipe.yaml", "--quiet").returncode == 0
    failed = smidgen(tmp_path, "merge", "out", "merged")
    assert failed.returncode == 2
    assert "cannot be merged" in failed.stderr
    assert not (tmp_path / "merged").exists()


def test_a_decoder_answers_in_text(tmp_path: Path) -> None:
    save_recipe(tmp_path, "training: {epochs: 2}\n", decoder=True)
    assert smidgen(tmp_path, "train", "recipe.yaml", "--quiet").returncode == 0
    answer = json.loads(smidgen(tmp_path, "predict", "out", given="the day\n").stdout)
    assert set(answer) == {"text", "answer"}


def test_a_finished_run_of_another_recipe_is_not_written_over(trained: Path) -> None:
    before = (trained / "out" / "metrics.json").read_bytes()
    refused = smidgen(trained, "train", "out/recipe.yaml", "--set", "technique=houlsby")
    assert refused.returncode == 2
    told = re.sub(r"\s+", " ", refused.stderr)
    assert "holds a finished run of another recipe (technique" in told
    assert "Add --set output=runs/NAME to keep it" in told
    assert (trained / "out" / "metrics.json").read_bytes() == before


def test_data_that_changed_after_training_are_not_scored_as_unseen(trained: Path) -> None:
    data = next(trained.glob("*.csv"))
    before = data.read_text()
    try:
        data.write_text(before + before.splitlines()[-1].replace("the", "one") + "\n")
        refused = smidgen(trained, "evaluate", "out")
        unknown = smidgen(trained, "evaluate", "out", "--data", data.name)
    finally:
        data.write_text(before)
    assert refused.returncode == 2
    assert "The data have changed since the adapter was trained" in refused.stderr
    assert smidgen(trained, "evaluate", "out").returncode == 0
    assert "has rows that were trained on is not known" in unknown.stderr
    assert "have a text that data.train has as well" in smidgen(trained, "evaluate", "out", "--data", data.name).stderr


def test_a_name_that_lacks_embedded_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: minilm\ndata: {train: embedded:tweets}\n")
    failed = smidgen(tmp_path, "plan", "r.yaml")
    assert "Did you mean 'embedded:minilm'?" in failed.stderr
