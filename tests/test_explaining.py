"""What `explain` says is what the adapter holds."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest
import torch

from smidgen import (
    HRA,
    IA3,
    OFT,
    Adapter,
    DoRA,
    HardPrompt,
    Houlsby,
    LlamaAdapter,
    LoRA,
    Method,
    PromptTuning,
    RepresentationMixing,
    UniPELT,
    attach,
    explain,
)
from smidgen.eight_bit import to_eight_bits
from smidgen.layers import embedding_rows
from smidgen.report.explained import as_picture, as_text
from smidgen.updates import changes
from tests.conftest import build


class Words:
    """A tokenizer whose tokens are written w0, w1, ..."""

    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 60

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{index}" for index in ids)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def __call__(self, text: str | list[str], **_: object) -> dict[str, list[object]]:
        texts = [text] if isinstance(text, str) else text
        rows = [[int(word[1:]) for word in one.split()] for one in texts]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}


def attached(method: Method) -> Adapter:
    return attach(build("llama"), method, tokenizer=Words())  # type: ignore[arg-type]


def test_a_soft_prompt_is_explained_by_its_nearest_words() -> None:
    adapter = attached(PromptTuning(length=2))
    table = embedding_rows(adapter.model.get_input_embeddings())
    with torch.no_grad():
        adapter.deltas[0][0].rows.copy_(3 * table[[17, 41]] + 0.001)
    (told,) = explain(adapter, Words())  # type: ignore[arg-type]
    assert [words.split()[0] for words, _ in told.values] == ["w17", "w41"]
    assert all(value == pytest.approx(1.0, abs=1e-3) for _, value in told.values)
    assert explain(adapter) == []


def test_a_hard_prompt_is_explained_by_its_wording() -> None:
    adapter = attached(HardPrompt(length=2, start="text", text="w9 w30"))
    (told,) = explain(adapter, Words())  # type: ignore[arg-type]
    assert told.about == "the wording 'w9 w30'"


def test_an_update_is_explained_by_its_spectrum() -> None:
    adapter = attached(LoRA(rank=3, targets="q_proj", layers="0"))
    delta = adapter.deltas[0][0]
    with torch.no_grad():
        delta.b.normal_()
    (told,) = explain(adapter, most=5)
    expected = torch.linalg.svdvals(delta.update())
    assert [name for name, _ in told.values] == ["σ1", "σ2", "σ3"]  # all of a rank of 3
    torch.testing.assert_close(torch.tensor([value for _, value in told.values]), expected[:3].detach())
    shares = expected.square().cumsum(0) / expected.square().sum()
    assert f"; {int((shares < 0.9).sum()) + 1} hold 90 % of the square" in told.about


def test_scales_are_explained_by_those_farthest_from_one() -> None:
    adapter = attached(IA3(outputs="k_proj", inputs=None, layers="0"))
    with torch.no_grad():
        adapter.deltas[0][0].scale[[3, 8]] = torch.tensor([0.2, 1.5])
    (told,) = explain(adapter, most=2)
    assert [name for name, _ in told.values] == ["number 3", "number 8"]
    assert [value for _, value in told.values] == [pytest.approx(-0.8), pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("method", "gates"),
    [
        (LlamaAdapter(layers="0"), 1),
        (RepresentationMixing(layers="0"), 1),
        (UniPELT(rank=2, targets="q_proj", layers="0"), 3),
    ],
    ids=["llama-adapter", "representation mixing", "unipelt"],
)
def test_gates_are_explained_by_how_far_they_are_open(method: Method, gates: int) -> None:
    adapter = attached(method)
    for delta in adapter.deltas[0]:
        for name, parameter in delta.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                torch.nn.init.constant_(parameter, -0.7)
    told = [one for one in explain(adapter) if one.about == "how far its gate is open"]
    expected = -0.7 if isinstance(method, LlamaAdapter) else torch.sigmoid(torch.tensor(-0.7)).item()
    assert [one.values for one in told] == [[("gate", pytest.approx(expected))]] * gates
    spectra = [one for one in explain(adapter) if "update" in one.about]
    assert len(spectra) == isinstance(method, UniPELT)


def test_an_update_of_zero_says_so() -> None:
    (told,) = explain(attached(LoRA(rank=3, targets="q_proj", layers="0")))
    assert (told.about, told.values) == ("no update: all of it is zero", [])


@pytest.mark.parametrize("method", [DoRA(rank=2), OFT(block_size=8), HRA(rank=2)], ids=lambda method: method.name)
def test_a_change_by_a_product_is_explained_by_the_spectrum_of_what_it_adds(method: Method) -> None:
    adapter = attached(dataclasses.replace(method, targets="q_proj", layers="0"))
    (told,) = explain(adapter)
    assert told.about == "no update: all of it is zero"
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    (told,) = explain(adapter, most=3)
    expected = torch.linalg.svdvals(changes(adapter)[adapter.places[0][0].name])[:3]
    torch.testing.assert_close(torch.tensor([value for _, value in told.values]), expected, atol=1e-5, rtol=1e-4)


def test_changes_of_weights_in_eight_bits_are_left_out() -> None:
    model = build("llama")
    to_eight_bits(model)
    assert explain(attach(model, OFT(block_size=8))) == []


def test_what_has_no_words_is_left_out() -> None:
    assert explain(attached(Houlsby())) == []


def test_text_and_picture_hold_every_value() -> None:
    adapter = attached(LoRA(rank=2))
    for delta in adapter.deltas[0]:
        torch.nn.init.ones_(delta.b)
    found = explain(adapter, most=2)
    text, picture = as_text(found), ElementTree.fromstring(as_picture(found, "What it has learned"))
    assert text.count("σ1") == len(found) == 21
    bars = [element for element in picture.iter() if element.get("class") == "bar"]
    assert len(bars) == 2 * len(found)
