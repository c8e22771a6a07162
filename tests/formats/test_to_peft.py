"""What is written for peft gives the same logits there; what peft cannot hold is refused, or its loss is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from smidgen import (
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    Adapter,
    BitFit,
    DoRA,
    FullFineTuning,
    HardPrompt,
    Houlsby,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAPlus,
    Method,
    MiSS,
    NormTuning,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    RsLoRA,
    UserError,
    VeRA,
    attach,
    load,
    save_peft,
)
from tests.conftest import build
from tests.formats.test_from_peft import answers
from tests.methods.test_contract import disturb

METHODS: dict[str, Method | list[Method]] = {
    "lora": LoRA(rank=4, alpha=6.0),
    "rslora": RsLoRA(rank=4, alpha=6.0),
    "lora-plus": LoRAPlus(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "pissa": PiSSA(rank=3),
    "adalora": AdaLoRA(rank=3, start_rank=4),
    "several ranks": [LoRA(rank=2, alpha=3.0, targets="attention"), RsLoRA(rank=4, targets="feed-forward")],
    "dora": DoRA(rank=4, alpha=6.0),
    "ia3": IA3(),
    "vera": VeRA(rank=6),
    "loha": LoHa(rank=3, alpha=6.0),
    "lokr": LoKr(rank=2, alpha=6.0),
    "lokr, factor": LoKr(rank=2, factor=4),
    "miss": MiSS(rank=4),
    "oft": OFT(block_size=8),
    "oft, series": OFT(block_size=8, terms=5),
    "hra": HRA(rank=4),
    "norm-tuning": NormTuning(),
    "lora and norms": [LoRA(rank=4), NormTuning()],
    "prefix-tuning": PrefixTuning(length=5),
    "prefix-tuning, MLP": PrefixTuning(length=5, hidden_size=16, start="random"),
    "p-tuning-v2": PTuningV2(length=5),
    "prompt-tuning": PromptTuning(length=5, placement="first"),
    "p-tuning": PTuning(length=5, placement="first"),
    "hard-prompt": HardPrompt(length=5, placement="first"),
}


@pytest.fixture(params=["llama", "gpt2", "bert"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_peft(architecture: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.PeftModel.from_pretrained(build(architecture), folder).eval()
        except TypeError as error:
            if "Conv1D" not in str(error):
                raise
            pytest.skip("peft itself does not put this technique on GPT-2's layers")


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_peft_loads_what_was_written_to_the_same_logits(
    methods: Method | list[Method], architecture: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = attach(model, methods, name="mine")
    disturb(adapter)
    expected = answers(model, architecture)
    if architecture == "gpt2" and isinstance(methods, (LoHa, LoKr, MiSS, OFT, HRA)):
        with pytest.raises(UserError, match="pass a rank"):  # peft does not put it on Conv1D
            save_peft(adapter, tmp_path / "theirs")
        assert save_peft(adapter, tmp_path / "theirs", rank=8) > 0
        return
    assert save_peft(adapter, tmp_path / "theirs") == 0
    torch.testing.assert_close(answers(model, architecture), expected)
    theirs = in_peft(architecture, tmp_path / "theirs")
    torch.testing.assert_close(answers(theirs, architecture), expected, atol=1e-5, rtol=0)
    again = build(architecture)
    load(again, tmp_path / "theirs")
    torch.testing.assert_close(answers(again, architecture), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method",
    [LoRA(dropout=0.1), PiSSA(dropout=0.1), DoRA(dropout=0.1), VeRA(dropout=0.1), MiSS(dropout=0.1)],
    ids=lambda method: method.name,
)
def test_dropout_is_written_too(method: Method, tmp_path: Path) -> None:
    save_peft(attach(build("llama"), method), tmp_path / "theirs")
    (again,) = load(build("llama"), tmp_path / "theirs").methods
    assert again.dropout == 0.1


def disturbed(methods: Method | list[Method], architecture: str = "llama") -> tuple[PreTrainedModel, Adapter]:
    model = build(architecture)
    adapter = attach(model, methods)
    disturb(adapter)
    return model, adapter


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (Houlsby(norms=False), "peft has no Houlsby adapter, and it is more than a change of weights"),
        ([LoRA(rank=2), PrefixTuning(length=3)], "it is more than a change of weights"),
        ([LoRA(rank=2), OFT(block_size=8)], "pass a rank, such as rank=16"),
        (FullFineTuning(), "peft keeps whole modules|peft has no Full fine-tuning"),
        (PromptTuning(placement="after-first"), "it stands after the first token"),
        (PrefixTuning(length=3, layers="last:1"), "here some have none"),
        (OFT(block_size=8, terms=3), "it sums 4 terms of the series where 3 are asked for"),
        ([LoRA(rank=2), RsLoRA(rank=2)], "one LoRA a layer, and here two meet"),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_reason(
    methods: Method | list[Method], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        save_peft(disturbed(methods)[1], tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="peft keeps whole modules, and of bert"):
        save_peft(disturbed([LoRA(rank=2), BitFit()], "bert")[1], tmp_path / "theirs")


@pytest.mark.parametrize("methods", [PromptTuning(), [LoRA(rank=2), PrefixTuning(length=3)], NormTuning()])
def test_a_rank_is_refused_where_no_lora_can_stand_for_the_adapter(
    methods: Method | list[Method], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"No LoRA can stand for this adapter|changes no linear layer"):
        save_peft(disturbed(methods)[1], tmp_path / "theirs", rank=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "methods",
    [[LoRA(rank=2), OFT(block_size=8)], DoRA(rank=4), LoRA(rank=9), [LoRA(rank=2), RsLoRA(rank=4)]],
    ids=["peft has no such hybrid", "DoRA", "a smaller rank", "two LoRAs on a layer"],
)
def test_a_change_of_weights_becomes_lora_and_its_loss_is_said(methods: Method | list[Method], tmp_path: Path) -> None:
    model, adapter = disturbed(methods)
    expected = answers(model, "llama")
    lost = [save_peft(adapter, tmp_path / str(rank), rank=rank) for rank in (2, 8, 32)]
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 1e-5
    torch.testing.assert_close(answers(model, "llama"), expected)
    torch.testing.assert_close(answers(in_peft("llama", tmp_path / "32"), "llama"), expected, atol=1e-4, rtol=0)
    near, far = (answers(in_peft("llama", tmp_path / rank), "llama") for rank in ("8", "2"))
    assert (near - expected).norm() < (far - expected).norm()


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True])
def test_a_rank_that_is_none_is_refused(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole number of at least 1"):
        save_peft(attach(build("bert"), LoRA()), tmp_path / "peft", rank=rank)
    assert not list(tmp_path.iterdir())
