"""Saving is whole or nothing; loading refuses whatever is not exactly what was saved, and leaves the model as it
was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen import (
    HardPrompt,
    HeadOnly,
    Houlsby,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    UserError,
    attach,
    files,
    load,
)
from smidgen.manifest import digest_of
from tests.conftest import build, make_batch
from tests.methods.test_contract import disturb, logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("bert")
    adapter = attach(model, LoRA(rank=2), name="task")
    disturb(adapter)
    adapter.save(tmp_path / "saved", metrics={"accuracy": 0.75}, labels=["a", "b", "c"])
    return tmp_path / "saved"


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "adapter.json").read_text())
    change(manifest)
    manifest["digest"] = digest_of(manifest)  # as somebody would who knows the format
    (folder / "adapter.json").write_text(json.dumps(manifest))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    rewrite(
        folder,
        lambda manifest: manifest["sha256"].update(
            {"adapter.safetensors": files.sha256(folder / "adapter.safetensors")}
        ),
    )


def refused(folder: Path, match: str, architecture: str = "bert") -> None:
    model = build(architecture)
    before = model.state_dict()
    with pytest.raises(UserError, match=match):
        load(model, folder)
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_metrics_may_be_named_by_numbers(tmp_path: Path) -> None:
    attach(build("bert"), LoRA()).save(tmp_path / "saved", metrics={1: 2.0, "classes": {1: 0.1, 2: 0.2, 10: 0.3}})
    load(build("bert"), tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "adapter.json").read_text())["metrics"]
    assert found == {"1": 2.0, "classes": {"1": 0.1, "2": 0.2, "10": 0.3}}


def test_labels_and_metrics_come_back(saved: Path) -> None:
    model = build("bert")
    load(model, saved)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert json.loads((saved / "adapter.json").read_text())["metrics"] == {"accuracy": 0.75}


def test_the_manifest_names_every_place(saved: Path) -> None:
    entry = json.loads((saved / "adapter.json").read_text())["techniques"][0]
    assert entry["technique"] == "lora"
    assert len(entry["places"]) == 3 * 6
    assert {
        "name": "bert.encoder.layer.0.attention.self.query",
        "source": None,
        "side": "output",
        "site": "layer",
    } in entry["places"]


@pytest.mark.parametrize("method", [PrefixTuning(length=4, hidden_size=16, start="random"), PTuning(length=4)])
def test_a_reparameterization_is_folded_away(method: PrefixTuning | PTuning, tmp_path: Path) -> None:
    adapter = attach(build("llama"), method)
    adapter.save(tmp_path / "saved")
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "saved" / "adapter.safetensors").values())
    assert stored == (4 * 2 * 16 * 3 if isinstance(method, PrefixTuning) else 4 * 32)
    assert stored < adapter.trainable


def test_files_are_readable_by_others(saved: Path) -> None:
    assert (saved / "adapter.safetensors").stat().st_mode & 0o044 == 0o044
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_saving_again_takes_the_old_one_s_place(saved: Path) -> None:
    model = build("bert")
    adapter = load(model, saved)
    disturb(adapter)
    expected = logits(model, make_batch("bert"))
    adapter.save(saved)
    again = build("bert")
    load(again, saved)
    assert torch.equal(logits(again, make_batch("bert")), expected)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_failed_save_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load(build("bert"), saved)
    before = files.sha256(saved / "adapter.safetensors")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smidgen.files._sync", full)
    with pytest.raises(UserError, match="No space is left"):
        adapter.save(saved)
    assert files.sha256(saved / "adapter.safetensors") == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_file_in_the_way_is_not_replaced(saved: Path) -> None:
    (saved.parent / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        load(build("bert"), saved).save(saved.parent / "file")
    assert (saved.parent / "file").read_text() == "mine"


def test_another_model_is_refused(saved: Path) -> None:
    refused(saved, "place 'bert.encoder.layer.0.attention.self.query'", "roberta")
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(2)
    with pytest.raises(UserError, match="other weights"):
        load(model, saved)
    assert load(model, saved, check_base=False).name == "task"


def test_the_base_in_bfloat16_is_the_same_base(saved: Path) -> None:
    assert load(build("bert").to(torch.bfloat16), saved).name == "task"


def test_other_weights_are_found_with_an_adapter_on_the_model(saved: Path) -> None:
    model = build("bert")
    first = attach(model, HeadOnly(), name="first")
    disturb(first)
    assert load(model, saved).active


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_file_cut_short_is_refused(saved: Path, size: int) -> None:
    data = (saved / "adapter.safetensors").read_bytes()
    (saved / "adapter.safetensors").write_bytes(data[:size])
    refused(saved, "cut short")


def test_every_flipped_bit_is_found(saved: Path) -> None:
    data = bytearray((saved / "adapter.safetensors").read_bytes())
    for position in range(0, len(data), len(data) // 20):
        data[position] ^= 1
        (saved / "adapter.safetensors").write_bytes(data)
        refused(saved, "SHA-256")
        data[position] ^= 1


def test_a_missing_file_or_folder_is_named(saved: Path) -> None:
    refused(saved.parent / "nowhere", "not a folder")
    shutil.copytree(saved, saved.parent / "half")
    (saved.parent / "half" / "adapter.safetensors").unlink()
    refused(saved.parent / "half", "has no adapter.safetensors")


def test_a_link_out_of_the_folder_is_refused(saved: Path) -> None:
    (saved / "adapter.safetensors").rename(saved.parent / "elsewhere")
    (saved / "adapter.safetensors").symlink_to(saved.parent / "elsewhere")
    refused(saved, "is a link")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("own"), "own: Field required"),
        (lambda m: m.update(format=99), "format: Input should be 1"),
        (lambda m: m["techniques"][0].update(technique="nonsense"), "technique 'nonsense' is not known"),
        (lambda m: m["techniques"][0]["fields"].update(rank=0), "rank must be at least 1"),
        (lambda m: m["techniques"][0]["fields"].update(rank=10**9), "above the size"),
        (lambda m: m["techniques"][0]["fields"].update(rank=3), "in the file"),
        (lambda m: m["techniques"][0]["fields"].update(unknown=3), "has the fields"),
        (lambda m: m["techniques"][0]["places"].pop(), "missing nothing; unknown "),
        (lambda m: m["own"].append("bert.nothing"), "which the model does not have"),
        (lambda m: m.update(name="two\nlines"), "name: Value error, name="),
        (lambda m: m.update(name=5), "name: Input should be a valid string"),
        (lambda m: m.update(labels=["a", "a", "b"]), "labels: Value error, a name appears twice"),
        (lambda m: m.update(labels=5), "labels: Input should be a valid list"),
        (lambda m: m.update(labels=["a", "b"]), "2 labels"),
        (lambda m: m.update(sha256=[]), "sha256: Input should be a valid dictionary"),
        (lambda m: m["techniques"][0]["fields"].update(rank=2.5), "rank"),
        (lambda m: m["techniques"][0]["fields"].update(targets=None), "targets"),
        (lambda m: m["own"].remove("classifier.bias"), "other weights"),
    ],
)
def test_a_changed_manifest_is_refused(saved: Path, change: Callable[[dict], None], match: str) -> None:
    rewrite(saved, change)
    refused(saved, match)


def test_a_duplicate_key_is_refused(saved: Path) -> None:
    text = (saved / "adapter.json").read_text()
    (saved / "adapter.json").write_text('{"format": 1,' + text.lstrip()[1:])
    refused(saved, "appears twice")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"classifier.bias": torch.tensor([1.0, float("nan"), 0.0])}), "not finite"),
        (lambda t: t.update({"classifier.bias": torch.zeros(3, dtype=torch.long)}), "not floating-point"),
        (lambda t: t.update({"classifier.bias": torch.zeros(4)}), r"is \(4,\) in the file"),
        (lambda t: t.update({"classifier.extra": torch.zeros(4)}), "unknown classifier.extra"),
        (lambda t: t.pop("classifier.bias"), "missing classifier.bias"),
    ],
)
def test_changed_tensors_are_refused(saved: Path, change: Callable[[dict], None], match: str) -> None:
    retensor(saved, change)
    refused(saved, match)


def test_a_pattern_in_a_file_is_never_run(saved: Path) -> None:
    rewrite(saved, lambda m: m["techniques"][0]["fields"].update(targets="(a+)+$" * 9))
    assert load(build("bert"), saved).name == "task"


def test_norms_and_heads_are_saved_with_the_deltas(tmp_path: Path) -> None:
    adapter = attach(build("bert"), Houlsby(size=4))
    adapter.save(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "adapter.safetensors").keys()
    assert {"classifier.weight", "bert.encoder.layer.0.output.LayerNorm.bias"} <= set(names)


def test_a_new_name_can_be_given(saved: Path) -> None:
    model = build("bert")
    assert load(model, saved, name="other").name == "other"
    with pytest.raises(ValueError, match="already"):
        load(model, saved, name="other")
    with pytest.raises(ValueError, match="not an adapter's name"):
        load(model, saved, name="two\nlines")


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), Houlsby(size=4), PrefixTuning(length=4, hidden_size=16, start="random")]
)
def test_the_size_on_disk_is_known_before(method: LoRA, tmp_path: Path) -> None:
    adapter = attach(build("bert"), method)
    adapter.save(tmp_path / "saved")
    header = (tmp_path / "saved" / "adapter.safetensors").stat().st_size - adapter.disk_bytes
    assert 0 < header < 10_000


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    attach(build("bert"), LoRA(rank=2)).save(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest))  # another layout is no other content
    load(build("bert"), tmp_path / "saved")
    manifest["techniques"][0]["fields"]["alpha"] = 32.0
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was changed after it was saved"):
        load(build("bert"), tmp_path / "saved")


def test_without_its_head_an_adapter_starts_another_task(tmp_path: Path) -> None:
    """The deltas come along; the head is the model's own, of other classes, and is trained."""
    model, batch = build("bert"), make_batch("bert")
    adapter = attach(model, LoRA(rank=4), name="mood")
    disturb(adapter)
    adapter.save(tmp_path / "mood", labels=["a", "b", "c"])
    config = copy.deepcopy(model.config)
    config.num_labels = 5
    adapter.detach()
    other = type(model)(config).eval()
    other.bert.load_state_dict(model.bert.state_dict())
    with pytest.raises(UserError, match="3 labels, and the model's head 5"):
        load(other, tmp_path / "mood")
    again = load(other, tmp_path / "mood", head=False)
    ours, theirs = adapter.state(), again.state()
    heads = {name for name in ours if name.startswith(("classifier", "bert.pooler"))}
    assert heads == again.head_names
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - heads)
    assert torch.equal(theirs["bert.pooler.dense.weight"], model.bert.pooler.dense.weight)
    other(**batch).loss.backward()
    again.check_gradients()
    assert other.classifier.weight.grad is not None


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    adapter = attach(build("bert"), LoRA(rank=2))
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite, so that nothing was written"):
        adapter.save(tmp_path / "diverged")
    assert not (tmp_path / "diverged").exists()


@pytest.mark.parametrize("method", [PrefixTuning, PTuningV2, PromptTuning, HardPrompt], ids=lambda method: method.name)
def test_virtual_tokens_that_leave_no_position_are_refused(method: type[Method]) -> None:
    with pytest.raises(ValueError, match=r"'s length=40 leaves no room for a text: 40 .* take the 40 positions"):
        attach(build("bert"), method(length=40))
    with pytest.raises(ValueError, match="'s length=30 leaves no room for a text: 40 virtual"):
        attach(build("bert"), [method(length=30), LoRA(), PTuning(length=10)])


def test_a_model_on_several_devices_is_refused() -> None:
    model = build("bert")
    model.bert.encoder.layer[1].to("meta")
    with pytest.raises(ValueError, match="lies on several devices: cpu, meta"):
        attach(model, LoRA())


def test_an_adapter_is_loaded_in_the_format_that_is_asked_for(tmp_path: Path) -> None:
    model = build("bert")
    attach(model, LoRA(rank=2)).model.to(torch.bfloat16)
    vars(model)["_smidgen_adapters"]["default"].save(tmp_path / "half")
    assert {
        p.dtype for p in load(build("bert"), tmp_path / "half", check_base=False, head=False).deltas[0][0].parameters()
    } == {torch.bfloat16}
    whole = load(build("bert"), tmp_path / "half", check_base=False, dtype=torch.float32)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


def test_several_that_save_into_one_folder_leave_a_whole_adapter(tmp_path: Path) -> None:
    adapters = [attach(build("bert"), LoRA()) for _ in range(3)]

    def save(number: int) -> None:
        adapters[number % 3].save(tmp_path / "saved")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(save, range(30)))
    load(build("bert"), tmp_path / "saved")
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_what_is_hidden_is_not_lost_without_a_word(saved: Path) -> None:
    (saved / ".git").mkdir()
    with pytest.raises(UserError, match=r"has other files, which would be lost: \.git"):
        attach(build("bert"), LoRA()).save(saved)
    assert (saved / ".git").is_dir()


def test_the_output_of_a_run_stands_for_the_adapter_in_it(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run" / "adapter")
    methods = [load(build("bert"), folder).methods for folder in (saved, tmp_path / "run")]
    assert methods[0] == methods[1]
    attach(build("bert"), LoRA(rank=3)).save(tmp_path / "outer")
    shutil.copytree(saved, tmp_path / "outer" / "adapter")
    assert load(build("bert"), tmp_path / "outer").methods[0].rank == 3  # an adapter itself


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    attach(build("bert"), LoRA()).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_a_file_that_a_system_hides_is_not_in_the_way(saved: Path) -> None:
    for name in (".DS_Store", "._adapter.json", ".nfs0001"):
        (saved / name).write_text("")
    attach(build("bert"), LoRA()).save(saved)
    assert sorted(file.name for file in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
