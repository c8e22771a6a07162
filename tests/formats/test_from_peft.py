"""An adapter that peft saved gives the same logits here, and what has no counterpart is refused with the reason."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from smidgen import UserError, load, save_peft
from tests.conftest import build, make_batch

Config = Callable[[dict[str, object]], peft.PeftConfig]

CONFIGS: dict[str, Config] = {
    "lora": lambda at: peft.LoraConfig(r=4, lora_alpha=6, **at),
    "lora, patterns": lambda at: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"layers.1": 2, "0": 3}, alpha_pattern={str(at["target_modules"][0]): 5}, **at
    ),
    "lora, rank-stabilized": lambda at: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **at),
    "lora, drawn": lambda at: peft.LoraConfig(r=4, init_lora_weights=False, **at),
    "lora, biases": lambda at: peft.LoraConfig(r=4, bias="lora_only", **at),
    "lora, all biases": lambda at: peft.LoraConfig(r=4, bias="all", **at),
    "lora, trained tokens": lambda at: peft.LoraConfig(r=4, trainable_token_indices=[7, 9], **at),
    "dora": lambda at: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **at),
    "adalora": lambda at: peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=6, total_step=10, **at),
    "ia3": lambda at: peft.IA3Config(**at, feedforward_modules=[at["target_modules"][-1]]),
    "vera": lambda at: peft.VeraConfig(r=6, **at),
    "loha": lambda at: peft.LoHaConfig(r=3, alpha=6, **at),
    "lokr": lambda at: peft.LoKrConfig(r=2, alpha=6, **at),
    "lokr, factor": lambda at: peft.LoKrConfig(r=2, alpha=6, decompose_factor=4, **at),
    "lokr, patterns": lambda at: peft.LoKrConfig(
        r=16, alpha=6, rank_pattern={str(at["target_modules"][0]): 12}, alpha_pattern={"0": 3}, **at
    ),
    "miss": lambda at: peft.MissConfig(r=4, **at),
    "oft, series": lambda at: peft.OFTConfig(oft_block_size=8, **at),
    "oft, exact": lambda at: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, **at),
    "hra": lambda at: peft.HRAConfig(r=4, **at),
    "norms": lambda at: peft.LNTuningConfig(task_type=at["task_type"], target_modules=at["norms"]),
    "prompt": lambda at: peft.PromptTuningConfig(num_virtual_tokens=5, task_type=at["task_type"]),
    "p-tuning": lambda at: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, task_type=at["task_type"]
    ),
    "prefix": lambda at: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=at["task_type"], **at["heads"]),
    "prefix, projected": lambda at: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type=at["task_type"], **at["heads"]
    ),
}
PLACES: dict[str, dict[str, object]] = {
    "llama": {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "norms": ["input_layernorm", "norm"],
        "heads": {"token_dim": 16, "num_attention_heads": 2},
    },
    "gpt2": {
        "task_type": "CAUSAL_LM",
        "target_modules": ["c_attn", "mlp.c_proj"],
        "norms": ["ln_1", "ln_f"],
        "heads": {},
    },
    "bert": {
        "task_type": "SEQ_CLS",
        "target_modules": ["query", "value", "intermediate.dense", "output.dense"],
        "norms": ["LayerNorm"],
        "heads": {},
    },
}


@pytest.fixture(params=PLACES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_peft(architecture: str, config: Config) -> peft.PeftModel:
    """A tiny model with peft's adapter on it, moved away from its start."""
    places = PLACES[architecture]
    own = {"norms", "heads"}
    layered = {key: value for key, value in places.items() if key not in own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = config(places)
        except TypeError:
            made = config(layered)
        try:
            model = peft.get_peft_model(build(architecture), made)
        except TypeError as error:
            if "Conv1D" not in str(error):
                raise
            pytest.skip("peft itself does not put this technique on GPT-2's layers")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def answers(model: torch.nn.Module, architecture: str) -> torch.Tensor:
    batch = make_batch(architecture)
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if found.dim() == 2:
        return found
    return found[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_saved_gives_the_same_logits(
    config: Config, architecture: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    theirs = in_peft(architecture, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    adapter = load(model, tmp_path / "theirs")
    assert adapter.name == "theirs"
    expected = answers(theirs, architecture)
    torch.testing.assert_close(answers(model, architecture), expected, atol=1e-5, rtol=0)
    with adapter.disabled():
        assert not torch.allclose(answers(model, architecture), expected, atol=1e-3)
    adapter.save(tmp_path / "ours")
    again = build(architecture)
    load(again, tmp_path / "ours")
    torch.testing.assert_close(answers(again, architecture), expected, atol=1e-5, rtol=0)


def saved(folder: Path, name: str = "lora") -> Path:
    """A folder that peft wrote for the tiny Llama."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("llama", CONFIGS[name]).save_pretrained(folder)
    return folder


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def adaption_prompt(architecture: str) -> peft.PeftModel:
    config = peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(architecture), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_an_adaption_prompt_is_its_keys_and_values(tmp_path: Path) -> None:
    theirs, model = adaption_prompt("llama"), build("llama")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    base = answers(model, "llama")
    adapter = load(model, tmp_path / "theirs")
    expected = answers(theirs, "llama")
    torch.testing.assert_close(answers(model, "llama"), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(base, expected, atol=1e-3)
    assert [place.name for place in adapter.places[0]] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    adapter.save(tmp_path / "ours")
    again = build("llama")
    load(again, tmp_path / "ours")
    assert torch.equal(answers(again, "llama"), answers(model, "llama"))
    with pytest.raises(UserError, match="projections of a prompt, and here they are trained themselves"):
        save_peft(adapter, tmp_path / "back")


@pytest.mark.filterwarnings("ignore")
def test_an_adaption_prompt_behind_the_output_projection_is_refused(tmp_path: Path) -> None:
    adaption_prompt("gpt2").save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(UserError, match="adds its prompt behind this model's output projection"):
        load(build("gpt2"), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_trained_tokens_alone_are_read(architecture: str, tmp_path: Path) -> None:
    tokens = make_batch(architecture)["input_ids"][0, :3].unique().tolist()
    config = peft.TrainableTokensConfig(token_indices=tokens, task_type=PLACES[architecture]["task_type"])
    theirs = peft.get_peft_model(build(architecture), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    model = build(architecture)
    base = answers(model, architecture)
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(answers(model, architecture), answers(theirs, architecture), atol=1e-5, rtol=0)
    assert not torch.equal(answers(model, architecture), base)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lora", {"peft_type": "BOFT"}, "peft_type=BOFT has no counterpart here; known: LORA, ADALORA"),
        ("lora", {"lora_bias": True}, "its lora_bias=True has no counterpart here"),
        ("lora", {"init_lora_weights": "pissa"}, "changed the weights of the base model"),
        ("lora", {"layer_replication": [[0, 2]]}, "its layer_replication="),
        ("lora", {"alpha_pattern": {"^(a+)+$": 3}}, "is a regular expression, which is not run"),
        ("lora", {"target_parameters": ["experts.weight"]}, "parameters that no layer of their own has"),
        ("dora", {"use_rslora": True}, "use_dora and use_rslora together"),
        ("hra", {"apply_GS": True}, "apply_GS"),
        ("oft, exact", {"coft": True}, "constrained"),
        ("miss", {"init_weights": "bat"}, "another kind of MiSS"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(
    name: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "theirs", name)
    change(folder, **fields)
    model = build("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(message)):
        load(model, folder)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_tensor_too_many_too_few_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    for changed, message in (
        ({**tensors, "base_model.model.model.extra": torch.ones(2)}, "belongs to nothing in the model"),
        ({name: tensor for name, tensor in tensors.items() if name != first}, "is incomplete"),
        ({**tensors, first: torch.ones(3, 4)}, "in the file and"),
        ({**tensors, first: tensors[first] * torch.nan}, "not finite"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            load(build("llama"), folder)


def test_an_adalora_whose_ranks_have_fallen_keeps_its_scale(tmp_path: Path) -> None:
    """peft divides by the rank at the start, whatever is left of it: one layer has two of five, one has none."""
    theirs = in_peft("llama", CONFIGS["adalora"])
    kept = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.self_attn.v_proj": 0}
    for name, module in theirs.base_model.model.named_modules():
        if name in kept:
            with torch.no_grad():
                module.lora_E["default"][kept[name] :] = 0
    expected = answers(theirs, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, rank in kept.items():
        for letter, axis in (("A", 0), ("E", 0), ("B", 1)):
            key = f"base_model.model.{name}.lora_{letter}"
            tensors[key] = tensors[key].narrow(axis, 0, rank).contiguous()
    save_file(tensors, file)
    change(tmp_path / "theirs", lora_dropout=0.1)
    model = build("llama")
    adapter = load(model, tmp_path / "theirs")
    torch.testing.assert_close(answers(model, "llama"), expected, atol=1e-5, rtol=0)
    assert all(method.dropout == 0.1 for method in adapter.methods)


def test_oft_s_blocks_may_differ_by_the_width_of_a_layer(tmp_path: Path) -> None:
    theirs = in_peft("llama", lambda at: peft.OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, **at))
    theirs.save_pretrained(tmp_path / "theirs")
    model = build("llama")
    adapter = load(model, tmp_path / "theirs")
    assert len({method.block_size for method in adapter.methods}) == 2
    torch.testing.assert_close(answers(model, "llama"), answers(theirs, "llama"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["lora", "vera", "hra", "oft, exact", "adalora", "miss"])
def test_a_folder_without_its_tensors_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs", name)
    save_file({"base_model.model.model.norm.weight": torch.ones(16)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"it has no tensor whose name ends in \."):
        load(build("llama"), folder)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="A pickle, .*, is never opened"):
        load(build("llama"), folder)


def of_tokens(folder: Path) -> Path:
    config = peft.TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(build("llama"), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 400], r"embed_tokens has 60 rows of 32 numbers, and the adapter \(2, 32\), for tokens from 3 to 400"),
        ([3, 4, 5], "for tokens from 3 to 5"),
        ([3, -5], "for tokens from -5 to 3"),
        ({"lm_head": [3, 4]}, "its configuration says tokens of \\['lm_head'\\]"),
    ],
)
def test_trained_tokens_that_do_not_fit_are_refused(tokens: object, message: str, tmp_path: Path) -> None:
    folder = of_tokens(tmp_path / "theirs")
    change(folder, token_indices=None, trainable_token_indices=tokens)
    with pytest.raises(UserError, match=message):
        load(build("llama"), folder)


def test_a_configuration_without_fields_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs")
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no fields, but a list"):
        load(build("llama"), folder)
