"""Tiny models built from configurations, no network; every test sees the same random state."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from smidgen import METHODS, AdapterFusion, Method, Pfeiffer, attach
from smidgen.embedded import cache_folder
from tests import zoo

VOCABULARY = 60
LABELS = 3

# initializer_range=0.2: at the default 0.02 a model this narrow gives the same logits whatever its input is


def _bert() -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=LABELS,
    )
    return transformers.BertForSequenceClassification(config)


def _distilbert() -> PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=40,
        num_labels=LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _roberta() -> PreTrainedModel:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=42,
        num_labels=LABELS,
    )
    return transformers.RobertaForSequenceClassification(config)


def _llama() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def _llama_classifier() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=LABELS,
    )
    return transformers.LlamaForSequenceClassification(config)


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=48,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "llama": _llama,
    "llama-classifier": _llama_classifier,
    "gpt2": _gpt2,
}
DECODERS = ("llama", "gpt2")
OPTIONS: dict[str, dict[str, bool | int]] = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4},
    "oft": {"block_size": 16},
    "progressive": {"start": 3},
    "adapter-drop": {"drop": 1, "robust": False},
}
"""What fits the tiny models better than the defaults."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed when the tests end


@functools.cache
def fused(build: Callable[[str], PreTrainedModel], architecture: str) -> str:
    """Two saved Pfeiffer adapters for a tiny model, as AdapterFusion names them."""
    names = [Path(_folder().name) / f"{architecture}-{number}" for number in range(2)]
    for seed, folder in enumerate(names):
        adapter = attach(build(architecture), Pfeiffer())
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        adapter.save(folder)
    return ", ".join(map(str, names))


def example(name: str, architecture: str) -> Method:
    """A technique with options that fit the tiny models; a test is skipped where a model cannot take it."""
    if name == "adapter-fusion":
        return AdapterFusion(adapters=fused(build, architecture))
    if name == "head" and architecture in DECODERS:
        pytest.skip("a language model has no task head: refused, and tested in test_adapter.py")
    if name == "bitfit" and architecture.startswith("llama"):
        pytest.skip("Llama has no biases: refused, and tested in test_adapter.py")
    return METHODS[name](**OPTIONS.get(name, {}))


@functools.cache
def _state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().state_dict()


def build(name: str) -> PreTrainedModel:
    """A tiny model, of these architectures or the zoo's, the same each time, in evaluation mode."""
    if name in zoo.ZOO:
        return zoo.build(name)
    model = ARCHITECTURES[name]()
    model.load_state_dict(_state(name))
    return model.eval()


def make_batch(name: str, *, rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids with padding on the right of the odd rows, their mask, and labels of the model's task; or the zoo's batch."""
    if name in zoo.ZOO:
        return zoo.make_batch(name)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -3:] = 0
    pad = 1 if name == "roberta" else 0
    ids[mask == 0] = pad
    if name in DECODERS:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(LABELS, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs keep of frozen states goes into a folder of the tests; what was fetched is read where it is."""
    own = tmp_path_factory.mktemp("cache")
    for folder in cache_folder().glob("*-*/"):
        (own / folder.name).symlink_to(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMIDGEN_CACHE", str(own))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    return build(architecture)


@pytest.fixture
def batch(architecture: str) -> dict[str, torch.Tensor]:
    return make_batch(architecture)
