"""Models come with the task's head and their tokenizer, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from smidgen.errors import UserError
from smidgen.placeholders import IGNORED
from smidgen.process.evaluate import loss_sum
from smidgen.process.models import kind, load_model, logits, longest_text
from tests.process.tiny import save_model, tokenizer

LABELS = ("no", "yes", "perhaps")

LANGUAGE = [
    *(transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel, transformers.Gemma2ForCausalLM),
    *(transformers.OPTForCausalLM, transformers.GPTNeoXForCausalLM, transformers.Qwen3ForCausalLM),
    *(transformers.BertForMaskedLM, transformers.RobertaForMaskedLM, transformers.DistilBertForMaskedLM),
    *(transformers.ElectraForMaskedLM, transformers.ModernBertForMaskedLM),
]


def encoder(folder: Path, *, seed: int = 0, precision: str = "fp32") -> transformers.PreTrainedModel:
    return load_model(str(folder), "classification", LABELS, seed=seed, precision=precision)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_a_classifier_knows_the_labels_of_the_data(folder: Path) -> None:
    model = encoder(folder)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {"no": 0, "yes": 1, "perhaps": 2}
    assert model.classifier.out_features == 3


def test_a_new_head_depends_on_the_seed_alone(folder: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever was drawn before
        heads.append(encoder(folder, seed=seed).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_for_other_classes_makes_way_for_a_new_one(folder: Path, tmp_path: Path) -> None:
    model, tokens = load_model(str(folder), "classification", ("a", "b"), seed=0, precision="fp32")
    for part in (model, tokens):
        part.save_pretrained(tmp_path / "two")
    assert torch.equal(encoder(tmp_path / "two").classifier.weight, encoder(folder).classifier.weight)
    same = load_model(str(tmp_path / "two"), "classification", ("a", "b"), seed=1, precision="fp32")[0]
    assert torch.equal(same.classifier.weight, model.classifier.weight)  # for the same classes it stays


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    encoder(folder)
    assert capfd.readouterr() == ("", "")


def test_a_decoder_without_padding_gets_one(tmp_path: Path) -> None:
    save_model(tmp_path, decoder=True)
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(
            json.dumps(fields | {"pad_token_id" if name == "config.json" else "pad_token": None})
        )
    model, _ = load_model(str(tmp_path), "generation", (), seed=0, precision="fp32")
    assert model.config.pad_token_id == model.config.eos_token_id


def test_kinds_are_told_apart_by_their_attention(folder: Path, tmp_path: Path) -> None:
    decoder, _ = load_model(str(save_model(tmp_path / "d", decoder=True)), "generation", (), seed=0, precision="fp32")
    assert (kind(encoder(folder)), kind(decoder)) == ("encoder", "decoder")


def test_precision_is_the_weights_and_the_activations_(folder: Path) -> None:
    model = encoder(folder, precision="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = {
        "input_ids": torch.tensor([[1, 5, 2]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "labels": torch.zeros(1, dtype=torch.int64),
    }
    assert logits(model, batch, "bf16").dtype == torch.bfloat16
    model.classifier.float()  # a trained part is fp32
    assert logits(model, batch, "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LANGUAGE, ids=[kind.__name__ for kind in LANGUAGE])
def test_words_are_computed_where_they_have_a_label_and_are_the_same(kind: type[transformers.PreTrainedModel]) -> None:
    sizes = {
        **{"vocab_size": 60, "intermediate_size": 8, "head_dim": 8, "pad_token_id": 0},
        **dict.fromkeys(("hidden_size", "n_embd", "dim"), 16),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2),
    }
    known = kind.config_class().to_dict()
    torch.manual_seed(0)
    model = kind(kind.config_class(**{name: value for name, value in sizes.items() if name in known})).eval()
    batch = {"input_ids": torch.randint(5, 60, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    labels = torch.full((3, 7), IGNORED)
    labels[0, 2:5], labels[2, 6] = 9, 11

    def loss(found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        losses = loss_sum(found, labels)
        losses.sum().backward()
        return losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    few = logits(model, batch | {"labels": labels}, "fp32")
    assert few.shape == (4, 60)
    expected = loss(model(**batch).logits)
    torch.testing.assert_close(loss(few), expected, atol=1e-6, rtol=1e-5)
    assert logits(model, batch | {"labels": torch.full((3, 7), IGNORED)}, "fp32").shape == (0, 60)
    assert model(**batch).logits.shape == (3, 7, 60)


def test_the_longest_text_fits_the_positions() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=30))
    config = transformers.RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=30, pad_token_id=1)
    roberta = transformers.RobertaModel(config)
    for model, longest in ((bert, 30), (roberta, 28)):
        assert longest_text(model, tokenizer(decoder=False)) == longest
        model(input_ids=torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer*", r"has no tokenizer \(tokenizer.json\)"),
        ("model.safetensors", "cannot be loaded for classification"),
    ],
)
def test_a_folder_that_lacks_something_says_what(folder: Path, missing: str, message: str) -> None:
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(UserError, match=message):
        encoder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_cut_short_is_no_traceback(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    with pytest.raises(UserError, match=r"model='.*' cannot be loaded for classification: \S+"):
        encoder(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing' is not a folder with a model"):
        encoder(tmp_path / "nothing")


def test_a_hub_that_is_out_of_reach_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model='nobody/nothing' cannot be loaded .* or embedded:minilm"):
        load_model("nobody/nothing", "generation", (), seed=0, precision="fp32")
