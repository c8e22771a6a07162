"""Places by role, pattern and layer range; what matches nothing is an error that says what would."""

from __future__ import annotations

import pytest
import torch
import transformers

from smidgen import Houlsby, LlamaAdapter, LoRA, Parallel, PrefixTuning, Progressive, attach, targets
from smidgen.stacking import adapters
from tests.conftest import build
from tests.methods.test_contract import disturb


def names(architecture: str, wanted: str, layers: str = "all") -> list[str]:
    return [place.name for place in targets.find(build(architecture), wanted, layers)]


@pytest.mark.parametrize(
    ("architecture", "attention", "feed_forward"),
    [
        (
            "bert",
            {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
            {"intermediate.dense", "output.dense"},
        ),
        (
            "distilbert",
            {"attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"},
            {"ffn.lin1", "ffn.lin2"},
        ),
        (
            "llama",
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
            {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        ),
        ("gpt2", {"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_roles_find_the_same_parts_in_every_architecture(
    architecture: str, attention: set[str], feed_forward: set[str]
) -> None:
    def parts(role: str) -> set[str]:
        block = targets.blocks(build(architecture))[0][0]
        return {name.removeprefix(f"{block}.") for name in names(architecture, role) if name.startswith(f"{block}.")}

    assert parts("attention") == attention
    assert parts("feed-forward") == feed_forward
    assert parts("all-linear") == attention | feed_forward
    assert len(parts("sublayers")) == 2
    assert names(architecture, "blocks") == targets.blocks(build(architecture))[0]


def test_roles_leave_embeddings_heads_and_poolers_alone() -> None:
    assert not {"bert.pooler.dense", "classifier"} & set(names("bert", "all-linear"))
    assert "lm_head" not in names("llama", "all-linear")


def test_a_sublayer_goes_from_its_first_input_to_its_last_output() -> None:
    place = targets.find(build("bert"), "feed-forward-sublayer")[0]
    assert (place.source, place.name) == (
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
    )
    assert place.shape == (32, 32)


def test_encoder_decoders_have_two_stacks_and_cross_attention() -> None:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    assert [len(stack) for stack in targets.blocks(model)] == [2, 2]
    ends = [place.name for place in targets.find(model, "attention-sublayer", "last:1")]
    assert ends == [
        "encoder.block.1.layer.0.SelfAttention.o",
        "decoder.block.1.layer.0.SelfAttention.o",
        "decoder.block.1.layer.1.EncDecAttention.o",
    ]


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("all", {0, 1, 2}), ("last:2", {1, 2}), ("first:1", {0}), ("0-1", {0, 1}), ("2,0", {0, 2}), ("1", {1})],
)
def test_layer_ranges(layers: str, blocks: set[int]) -> None:
    assert {int(name.split(".")[3]) for name in names("bert", "all-linear", layers)} == blocks


@pytest.mark.parametrize("layers", ["last:4", "3", "last:0", "some", "2-1", "0,9", ""])
def test_a_range_that_names_no_block_is_an_error_with_the_numbers(layers: str) -> None:
    with pytest.raises(ValueError, match="numbered 0 to 2"):
        names("bert", "all-linear", layers)


def test_patterns_match_a_whole_name_or_a_dotted_end() -> None:
    assert len(names("bert", "query")) == 3
    assert names("bert", r"layer\.1\..*query") == ["bert.encoder.layer.1.attention.self.query"]
    assert len(names("bert", "query|key")) == 6
    assert names("bert", "pooler.dense") == ["bert.pooler.dense"]
    assert len(names("bert", "query", "last:1")) == 1
    assert len(targets.find(build("bert"), ["query", "feed-forward"])) == 9


def test_nothing_matched_names_what_would() -> None:
    expected = (
        "matches no layer of BertForSequenceClassification. Its linear layers: classifier, dense, key, query, value."
    )
    with pytest.raises(ValueError, match=f"targets='q_proj' {expected}"):
        names("bert", "q_proj")
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        names("bert", "atention")
    with pytest.raises(ValueError, match="neither a role"):
        names("bert", "(")
    with pytest.raises(ValueError, match="in layers='last:1'"):
        names("bert", r"layer\.0\..*query", "last:1")


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="matches no layer"):
        attach(model, [LoRA(rank=2), LoRA(rank=2, targets="nothing")])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("deltas" in name for name, _ in model.named_modules())


def test_the_report_marks_uneven_matches() -> None:
    model = build("bert")
    found = targets.find(model, r"layer\.[01]\..*query")
    assert targets.report(model, found) == ["attention.self.query: 2 of 3 blocks"]
    assert targets.report(model, targets.find(model, "blocks")) == ["whole block: 3 of 3 blocks"]
    assert targets.report(model, targets.find(model, "pooler.dense")) == ["bert.pooler.dense: outside the blocks"]


def test_a_cross_attention_starts_from_its_queries_wherever_they_stand() -> None:
    """BART registers the keys' layer first, which reads the encoder's states."""
    places = targets.find(build("bart"), "attention-sublayer")
    assert {place.source.rpartition(".")[2] for place in places if place.source} == {"q_proj"}
    model = build("bart")
    disturb(attach(model, Parallel(targets="attention-sublayer")))
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        short = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        long = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(short, long[:, :4], atol=1e-5, rtol=0)


def test_a_bottleneck_on_one_of_several_experts_is_refused() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        num_experts=3,
        num_sparse_encoder_layers=2,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    for method in (Houlsby(), Parallel(targets="sublayers")):
        with pytest.raises(ValueError, match=r"would act on the tokens of one expert alone.*'attention-sublayer'"):
            attach(model, method)
    attach(model, Houlsby(targets="attention-sublayer"))


def test_keys_and_values_of_different_sizes_take_no_prefix() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    for method in (PrefixTuning(), LlamaAdapter()):
        with pytest.raises(ValueError, match="a prefix has both alike"):
            attach(model, method)


def test_layers_that_a_technique_cannot_have_leave_the_model_as_it_was() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="last:99"):
        attach(model, [LoRA(), Progressive(weights=False, layers="last:99")])
    assert not adapters(model)
    attach(model, LoRA())


def test_parallel_adapters_need_whole_sublayers() -> None:
    with pytest.raises(ValueError, match="whole sublayers"):
        Parallel(targets="query")
