"""What a technique may ask of a layer, whatever its class: its features, and its weight as a matrix."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer maps (..., in) to (..., out) by a weight: Linear, GPT-2's Conv1D, and their quantized kin."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer) or _duck_linear(layer)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D, a linear layer whose weight is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _duck_linear(layer: nn.Module) -> bool:
    features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return all(isinstance(feature, int) for feature in features)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer.

    Raises:
        TypeError: the layer is not linear.
    """
    if is_conv1d(layer) and isinstance(layer.weight, Tensor):
        inside, outside = layer.weight.shape
        return int(inside), int(outside)
    if is_linear(layer):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    raise TypeError(f"{type(layer).__name__} is not a linear layer.")


def output_is_ours(layer: nn.Module) -> bool:
    """Whether nothing but the one hook that runs the deltas sees the layer's output before it is changed.

    A `Linear` makes a new tensor at every call and keeps none of it, so that the output may then be changed in place.
    """
    return type(layer) is nn.Linear and len(layer._forward_hooks) == 1 and not _global_forward_hooks


def in_place(output: Tensor, *shape: int) -> Tensor:
    """A layer's output that is ours, in another shape, to be changed in place and used instead.

    Autograd takes it for a tensor of its own. A change of what it knows as a view would copy the whole gradient three
    times in the backward pass, which took as long as the rest of LoRA's. It is told that the output changes, so that a
    technique before, which needs its own result for its gradient, raises an error instead of computing a wrong one.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(output)
    return torch.ops.aten._unsafe_view(output, shape)  # type: ignore[no-any-return]


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight has no numbers to compute with."""
    weight = layer.weight
    return not isinstance(weight, Tensor) or not weight.is_floating_point()


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in).

    Raises:
        ValueError: it is quantized, so that there are no numbers to compute with.
    """
    weight = layer.weight
    if is_quantized(layer) or not isinstance(weight, Tensor):
        raise ValueError(f"A {type(layer).__name__}'s weight is quantized. Load the model unquantized.")
    return weight.detach().T if is_conv1d(layer) else weight.detach()


def set_weight(layer: nn.Module, matrix: Tensor) -> None:
    """Let an (out, in) matrix take the place of the layer's weight, rounded to its format."""
    weight_matrix(layer).copy_(matrix)


def add_to_weight(layer: nn.Module, update: Tensor) -> None:
    """Add an (out, in) matrix to the layer's weight; the sum is taken in fp32 at least, so that it rounds once."""
    weight = weight_matrix(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    set_weight(layer, weight.to(wide) + update.detach().to(wide))


def embedding_rows(embedding: nn.Module) -> Tensor:
    """The rows that an embedding gives, (vocabulary, hidden size): its weight, multiplied where the model does so."""
    weight, scale = embedding.weight, getattr(embedding, "embed_scale", None)
    assert isinstance(weight, Tensor)
    return weight.detach() if scale is None else weight.detach() * scale


def is_causal(model: nn.Module) -> bool:
    """Whether the model's attention looks back only, as a decoder's does.

    Attentions say so by themselves, except old ones (BLOOM's, MPT's); of those, the models that generate text and fill
    no gaps in it are decoders.
    """
    from transformers.models.auto import modeling_auto as auto

    # asked at every step, and a module looks long for what it does not have
    if any(vars(layer).get("is_causal", getattr(type(layer), "is_causal", None)) is True for layer in model.modules()):
        return True
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model, so that several processes hold parts of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # half a second to import
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def text_reader(model: PreTrainedModel) -> PreTrainedModel:
    """The module that reads the text: an encoder-decoder's encoder, and any other model itself."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def input_embedding(model: PreTrainedModel) -> nn.Module:
    """What turns the text's ids into rows."""
    return text_reader(model).get_input_embeddings()


def positions(model: nn.Module) -> int | None:
    """How many positions the model's learned table has for a text; None where positions are computed."""
    learned = any(
        isinstance(layer, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, layer in model.named_modules()
    )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit - position_offset(model) if learned and limit is not None else None


def positions_follow_mask(model: nn.Module) -> bool:
    """Whether the model counts a text's positions from its attention mask, as OPT does, and not from the first column.

    Its table of positions says so, by taking the mask.
    """
    return any(
        isinstance(layer, nn.Embedding) and "attention_mask" in inspect.signature(layer.forward).parameters
        for layer in model.modules()
    )


def counts_columns(model: nn.Module) -> bool:
    """Whether some layer counts how far apart tokens are by their columns, whatever their positions."""
    config = getattr(model, "config", None)
    windows = ("sliding_window", "local_attention", "attention_window", "relative_attention")
    kind = str(getattr(config, "position_embedding_type", None))
    return kind.startswith("relative") or any(getattr(config, name, None) for name in windows)


def position_offset(model: nn.Module) -> int:
    """The first position of a text: 0, but RoBERTa and its kin count from their padding's id."""
    table = getattr(getattr(getattr(model, "base_model", model), "embeddings", None), "position_embeddings", None)
    padding = table.padding_idx if isinstance(table, nn.Embedding) else None
    return 0 if padding is None else padding + 1
