"""The handle: counts, guards, several techniques and several adapters on one model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import smidgen
from smidgen import (
    OFT,
    AdaLoRA,
    Adapter,
    BitFit,
    Compacter,
    HeadOnly,
    Houlsby,
    Invertible,
    LoRA,
    Method,
    NormTuning,
    Parallel,
    Pfeiffer,
    PrefixTuning,
    Progressive,
    PromptTuning,
    attach,
    load,
    rows,
)
from smidgen.delta import Delta
from smidgen.own import head_names
from tests.conftest import LABELS, build, make_batch
from tests.methods.test_contract import disturb, logits


def test_the_public_names_are_exactly_all() -> None:
    assert sorted(smidgen.__all__) == sorted(set(smidgen.__all__))
    assert all(getattr(smidgen, name) is not None for name in smidgen.__all__)
    assert set(dir(smidgen)) == {*smidgen.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smidgen.nothing  # noqa: B018


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, smidgen; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_counts_and_repr_are_the_paper_s() -> None:
    model = build("bert")
    total = sum(parameter.numel() for parameter in model.parameters())
    adapter = attach(model, LoRA(rank=2, targets="query|value"), name="sst2")
    lora = 3 * 2 * 2 * (32 + 32)  # layers x (query, value) x rank x (in + out)
    head = 32 * 32 + 32 + 32 * LABELS + LABELS  # the pooler and the classifier
    assert adapter.trainable == lora + head
    assert adapter.total == total + lora
    assert repr(adapter).startswith(f"LoRA 'sst2': 6 places, {lora + head:,} trainable of ")


def test_heads_are_found_by_structure() -> None:
    dense = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert head_names(build("bert")) == [*dense, "classifier.weight", "classifier.bias"]
    assert {name.rpartition(".")[0] for name in head_names(build("roberta"))} == {
        "classifier.dense",
        "classifier.out_proj",
    }
    assert {name.split(".")[0] for name in head_names(build("distilbert"))} == {"pre_classifier", "classifier"}
    assert head_names(build("llama-classifier")) == ["score.weight"]
    assert head_names(build("llama")) == []
    assert head_names(transformers.BertForMaskedLM(build("bert").config)) == []


def test_head_only_refuses_a_model_without_a_head() -> None:
    with pytest.raises(ValueError, match="no task head"):
        attach(build("llama"), HeadOnly())


def test_bitfit_refuses_a_model_without_biases() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases"):
        attach(build("llama"), BitFit())


def test_bitfit_and_norm_tuning_train_what_they_name() -> None:
    model = build("bert")
    biases = attach(model, BitFit()).own_names
    assert {name.rpartition(".")[2] for name in biases - set(head_names(model))} == {"bias"}
    assert "bert.embeddings.LayerNorm.bias" in biases
    norms = attach(build("llama"), NormTuning()).own_names
    assert "model.norm.weight" in norms
    assert len(norms) == 7
    assert attach(build("llama"), NormTuning(layers="last:1")).own_names == {
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
    }


def test_an_invertible_adapter_undoes_itself_before_the_output_embedding() -> None:
    model = build("llama")
    adapter = attach(model, Invertible())
    assert [place.name for place in adapter.places[0]] == ["model.layers.0", "lm_head"]
    disturb(adapter)
    there, back = adapter.deltas[0]
    hidden = torch.randn(2, 5, 32)
    changed = there(model, (), hidden)
    assert not torch.allclose(changed, hidden, atol=1e-2)
    torch.testing.assert_close(back(model, (), changed), hidden, atol=1e-5, rtol=1e-4)


def test_an_invertible_adapter_needs_one_width_at_both_ends() -> None:
    config = transformers.ElectraConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(ValueError, match=r"Invertible adapter is undone where it began, and .* 32 numbers, .* 16"):
        attach(transformers.ElectraForMaskedLM(config), Invertible())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (AdaLoRA, {"orthogonality": float("nan")}, "orthogonality must be at least 0"),
        (Progressive, {"decay": float("inf")}, "decay must be at least 1"),
        (OFT, {"terms": 1}, "terms must be at least 2"),
        (Houlsby, {"targets": "all-linear"}, "Houlsby adapter's targets must be whole sublayers"),
        (Compacter, {"targets": "query"}, "Compacter's targets must be whole sublayers"),
    ],
)
def test_options_that_make_no_technique_are_refused(method: type[Method], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_also_train_adds_the_model_s_own() -> None:
    adapter = attach(build("bert"), LoRA(rank=2), also_train="attention.output.LayerNorm.*")
    norms = {f"bert.encoder.layer.{block}.attention.output.LayerNorm.bias" for block in range(3)}
    assert norms < {name for name, _ in adapter.named_parameters()}
    with pytest.raises(ValueError, match="also_train='LayerNrom' matches no parameter"):
        attach(build("bert"), LoRA(rank=2), also_train="LayerNrom")


def test_a_list_of_techniques_is_one_adapter() -> None:
    model, batch = build("bert"), make_batch("bert")
    before = logits(model, batch)
    adapter = attach(model, [LoRA(rank=2), Houlsby(size=4), PrefixTuning(length=2), PromptTuning(length=3)])
    disturb(adapter)
    model(**batch).loss.backward()
    adapter.check_gradients()
    assert adapter.virtual_tokens == 5
    adapter.detach()
    assert torch.equal(logits(model, batch), before)


def test_two_equal_techniques_must_not_meet() -> None:
    with pytest.raises(ValueError, match="Two LoRA techniques of one adapter meet at"):
        attach(build("bert"), [LoRA(rank=2), LoRA(rank=4, targets="query")])
    model = build("bert")
    assert attach(model, [LoRA(rank=2, targets="query"), LoRA(rank=4, targets="value")]).trainable > 0


def test_a_new_adapter_silences_the_others_and_leaves_them_whole() -> None:
    model, batch = build("bert"), make_batch("bert")
    base = logits(model, batch)
    first = attach(model, LoRA(rank=2), name="first")
    disturb(first)
    answer = logits(model, batch)
    state = first.state()
    second = attach(model, Pfeiffer(), name="second")
    assert not first.active
    disturb(second)
    assert all(torch.equal(value, state[name]) for name, value in first.state().items())
    second.deactivate()
    assert torch.equal(logits(model, batch), base)
    first.activate()
    assert torch.equal(logits(model, batch), answer)
    first.detach()
    second.detach()
    assert torch.equal(logits(model, batch), base)


def test_only_the_last_adapter_trains() -> None:
    model = build("bert")
    first = attach(model, LoRA(rank=2), name="first")
    second = attach(model, LoRA(rank=2), name="second")
    assert all(parameter.requires_grad for parameter in second.parameters())
    trained = {id(parameter) for parameter in second.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    assert not trained & {id(parameter) for parameter in first.parameters()}


NAMES = [
    "a b",
    "../x",
    "-x",
    "a/b",
    "v1.2",
    "v1%2E2",
    "a:lora",
    "naïve été",
    "图",
    "keys",
    "training",
    "100 %",
    "'\"{}\\",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_be_anything_on_one_line(name: str, tmp_path: Path) -> None:
    model, batch = build("bert"), make_batch("bert")
    base = logits(model, batch)
    adapter = attach(model, [LoRA(rank=2), PrefixTuning(length=2)], name=name)
    attach(model, LoRA(rank=2), name=name[::-1] + "2")
    adapter.activate()
    disturb(adapter)
    expected = logits(model, batch)
    with rows(model, [name, None, name, name]):
        mixed = logits(model, batch)
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], expected[0])
    adapter.save(tmp_path / "saved")
    other = build("bert")
    assert load(other, tmp_path / "saved").name == name
    assert torch.equal(logits(other, batch), expected)
    adapter.detach()
    assert sum(name.startswith("own:") for name, _ in model.named_children()) == 1


def test_names_that_only_a_module_s_name_would_mix_up_are_two() -> None:
    model = build("bert")
    for name in ("v1.2", "v1%2E2"):
        attach(model, LoRA(rank=2), name=name)
    assert sum(name.startswith("own:") for name, _ in model.named_children()) == 2


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "two\nlines", "tab\t", "x" * 65, "half \ud800", "\x00"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an adapter's name"):
        attach(build("bert"), LoRA(rank=2), name=name)


def test_a_taken_name_is_refused() -> None:
    model = build("bert")
    attach(model, LoRA(rank=2), name="keys")  # and a name of ModuleDict's own is no trouble
    with pytest.raises(ValueError, match="already"):
        attach(model, LoRA(rank=2), name="keys")


class Bypass(nn.Module):
    """Uses a layer's weight without calling the layer, as fused kernels do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_delta_that_is_never_called_is_named() -> None:
    model = build("bert")
    attention = model.bert.encoder.layer[1].attention.self
    attention.query = Bypass(attention.query)
    adapter = attach(model, LoRA(rank=2))
    model(**make_batch("bert")).loss.backward()
    with pytest.raises(RuntimeError, match=r"1 deltas .* no gradient: bert.encoder.layer.1.attention.self.query.layer"):
        adapter.check_gradients()


def test_a_rank_above_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 33 is above the size of"):
        attach(build("bert"), LoRA(rank=33))


def test_full_fine_tuning_without_its_base_says_so() -> None:
    adapter = attach(build("bert"), smidgen.FullFineTuning())
    with pytest.raises(RuntimeError, match="keep_base=False"):
        adapter.detach()


def test_tied_weights_stay_tied() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            tie_word_embeddings=True,
        )
    )
    adapter = attach(model, smidgen.FullFineTuning(keep_base=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    disturb(adapter)
    with adapter.disabled():
        assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_text_s_own_columns_come_back() -> None:
    model, batch = build("bert"), make_batch("bert")
    attach(model, PromptTuning(length=4))
    output = model(**batch, output_hidden_states=True)
    assert all(hidden.shape[1] == batch["input_ids"].shape[1] for hidden in output.hidden_states)


def test_a_prompt_on_an_encoder_stands_after_the_first_token() -> None:
    model, batch = build("bert"), make_batch("bert")
    attach(model, PromptTuning(length=2, start="vocabulary"))
    rows = model.bert.embeddings.word_embeddings.deltas.get_submodule("default:prompt-tuning").rows
    with torch.no_grad():
        rows.copy_(model.bert.embeddings.word_embeddings.weight[[7, 8]])
    answer = logits(model, batch)
    plain = build("bert")
    ids = batch["input_ids"]
    typed = torch.cat([ids[:, :1], torch.tensor([[7, 8]]).expand(len(ids), -1), ids[:, 1:]], dim=1)
    mask = torch.cat(
        [batch["attention_mask"][:, :1], torch.ones(len(ids), 2, dtype=torch.long), batch["attention_mask"][:, 1:]], 1
    )
    with torch.no_grad():
        torch.testing.assert_close(answer, plain(input_ids=typed, attention_mask=mask).logits)


def test_a_text_too_long_for_the_positions_says_by_how_much() -> None:
    model = build("bert")
    attach(model, PromptTuning(length=10))
    batch = make_batch("bert", length=31)
    with pytest.raises(ValueError, match="Shorten the text to 30 tokens"):
        model(**batch)


def test_an_attention_that_takes_no_prefix_says_so() -> None:
    model = transformers.LlamaForCausalLM(build("llama").config)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot take a prefix"):
        attach(model, PrefixTuning())
    model.config._attn_implementation_internal = "eager"
    assert attach(model, PrefixTuning()).virtual_tokens == 16


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_a_prefix_gives_the_same_through_both_kernels(architecture: str) -> None:
    batch, answers = make_batch(architecture), []
    for kernel in ("sdpa", "eager"):
        model = build(architecture)
        model.set_attn_implementation(kernel)
        torch.manual_seed(3)
        disturb(attach(model, PrefixTuning(length=3)))
        real = batch["attention_mask"].bool()
        answer = logits(model, batch)
        answers.append(answer[real] if answer.dim() == 3 else answer)
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_keeps_fp32_deltas() -> None:
    model = build("bert").to(torch.bfloat16)
    methods = [LoRA(rank=2), Parallel(size=4), PrefixTuning(length=2), PromptTuning(length=2)]
    adapter = attach(model, methods)
    deltas = [p for n, p in adapter.named_parameters() if n not in adapter.own_names]
    assert {parameter.dtype for parameter in deltas} == {torch.float32}
    model(**make_batch("bert")).loss.backward()
    adapter.check_gradients()


def test_a_model_with_an_adapter_can_be_pickled_and_compiled() -> None:
    model, batch = build("bert"), make_batch("bert")
    disturb(attach(model, [LoRA(rank=2), Parallel(size=4)]))
    expected = logits(model, batch)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-5)


def test_logits_of_classes_are_never_cut() -> None:
    config = copy.deepcopy(build("bert").config)
    config.num_labels = 12
    model = transformers.BertForSequenceClassification(config)
    attach(model, PromptTuning(length=3))
    assert model(input_ids=torch.randint(5, 60, (2, 9))).logits.shape == (2, 12)  # 9 tokens and 3 virtual ones
    config = copy.deepcopy(config)
    config.num_labels, config.problem_type = 9, "multi_label_classification"
    many = transformers.BertForSequenceClassification(config)
    attach(many, PromptTuning(length=3))
    assert many(input_ids=torch.randint(5, 60, (2, 9)), labels=torch.rand(2, 9)).loss > 0


def test_an_answer_s_positions_move_with_the_text() -> None:
    config = copy.deepcopy(build("bert").config)
    config.num_labels = 2
    model = transformers.BertForQuestionAnswering(config).eval()
    attach(model, PromptTuning(length=3))
    starts, ends = torch.tensor([1, 4]), torch.tensor([2, 8])
    with torch.no_grad():
        model.qa_outputs.weight.mul_(100)  # so that the columns differ
    output = model(input_ids=torch.randint(5, 60, (2, 9)), start_positions=starts, end_positions=ends)
    scores = torch.stack([output.start_logits[[0, 1], starts], output.end_logits[[0, 1], ends]])
    others = torch.stack([output.start_logits.logsumexp(1), output.end_logits.logsumexp(1)])
    assert output.start_logits.shape == (2, 9)
    assert output.loss >= (others - scores).mean() - 1e-5  # the model's own loss counts the prompt's columns as well


def test_a_prompt_whose_model_is_not_called_says_so() -> None:
    model = build("llama")
    adapter = attach(model, PromptTuning(length=3))
    ids = torch.randint(5, 60, (1, 6))
    with pytest.raises(ValueError, match="Call that model, or disable"):
        model.model(input_ids=ids)
    with adapter.disabled():
        model.model(input_ids=ids)


def test_a_quantized_weight_is_not_merged_into() -> None:
    model = build("llama")
    adapter = attach(model, LoRA(rank=2, targets="q_proj"))
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight.requires_grad_(False)
    layer.weight.data = layer.weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj is quantized"):
        adapter.merge()
    assert adapter.active


def test_a_prefix_survives_a_pickle_in_another_process(tmp_path: Path) -> None:
    model, batch = build("bert"), make_batch("bert")
    disturb(attach(model, PrefixTuning(length=2)))
    torch.save((model, batch, logits(model, batch)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_a_block_that_runs_several_times_takes_one_prefix() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
    model = transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3)
    )
    adapter = attach(model, PrefixTuning(length=2))
    assert [len(found) for found in adapter.places] == [1]
    model(input_ids=torch.randint(5, 60, (2, 9)), labels=torch.tensor([0, 1])).loss.backward()
    adapter.check_gradients()


def test_a_prefix_follows_positions_that_are_counted_from_the_mask() -> None:
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    )
    model = transformers.OPTForCausalLM(config).eval()
    disturb(attach(model, PrefixTuning(length=2)))
    text = torch.randint(5, 60, (1, 6))
    padded = torch.cat([torch.full((1, 3), config.pad_token_id), text], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        ours = model(input_ids=padded, attention_mask=mask).logits[:, 3:].clone()
        torch.testing.assert_close(ours, model(input_ids=text, attention_mask=torch.ones_like(text)).logits)


def test_a_malformed_pattern_is_told() -> None:
    with pytest.raises(ValueError, match=r"also_train='\(' is no pattern: "):
        attach(build("bert"), LoRA(), also_train="(")


def test_a_bfloat16_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """The fingerprint takes a sample of each large weight, which is a view of it where no number is converted."""
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    torch.manual_seed(0)
    state = transformers.BertForSequenceClassification(config).state_dict()
    models = [transformers.BertForSequenceClassification(config).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    for model in models:
        model.load_state_dict(state)
    attach(models[0], LoRA(rank=2)).save(tmp_path / "saved")
    assert smidgen.load(models[1], tmp_path / "saved").name == "default"


def test_a_handle_whose_adapter_is_gone_says_so_and_changes_nothing() -> None:
    model, batch = build("bert"), make_batch("bert")
    merged = attach(model, LoRA(rank=2), name="merged")
    disturb(merged)
    merged.merge()
    gone = attach(model, LoRA(rank=2), name="gone")
    gone.detach()
    expected = logits(model, batch)
    for adapter in (merged, gone):
        for use in (adapter.merge, adapter.detach, adapter.activate, adapter.deactivate, adapter.disabled().__enter__):
            with pytest.raises(RuntimeError, match="is no longer on the model"):
                use()
        with pytest.raises(RuntimeError, match="is no longer on the model"):
            adapter.save("nowhere")
    assert torch.equal(logits(model, batch), expected)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("given", ["lora", LoRA, [LoRA(), "head"]])
def test_what_is_no_technique_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match=r"attach takes techniques such as LoRA\(rank=8\)"):
        attach(build("bert"), given)  # type: ignore[arg-type]


def test_a_layer_that_blocks_share_has_one_delta() -> None:
    model, batch = build("bert"), make_batch("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    before, state = logits(model, batch), list(model.state_dict())
    adapter = attach(model, LoRA(rank=2))
    assert len(adapter.places[0]) == 12
    model(**batch).loss.backward()
    adapter.check_gradients()
    adapter.detach()
    assert torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(LoRA):
    """A technique whose schedule cannot be."""

    def schedule(self, adapter: Adapter, deltas: Sequence[Delta]) -> None:
        raise ZeroDivisionError


def test_a_technique_that_fails_at_the_end_leaves_the_model_as_it_was() -> None:
    model, batch = build("bert"), make_batch("bert")
    first = attach(model, LoRA(), name="first")
    before, state = logits(model, batch), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        attach(model, Failing(), name="second")
    assert first.active
    assert torch.equal(logits(model, batch), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, nn.Sequential()])
def test_what_is_no_model_of_transformers_is_refused(other: object) -> None:
    with pytest.raises(TypeError, match="is not a model of transformers"):
        attach(other, LoRA())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_of_peft_s_on_it_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="Give the model that peft was given"):
        attach(theirs, LoRA())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has an adapter of peft's on it"):
        attach(model, LoRA())
    with pytest.raises(TypeError, match="has an adapter of peft's on it"):
        load(model, tmp_path)


def test_before_a_backward_pass_no_delta_has_a_gradient() -> None:
    with pytest.raises(RuntimeError, match="Ask after a backward pass"):
        attach(build("bert"), LoRA()).check_gradients()
