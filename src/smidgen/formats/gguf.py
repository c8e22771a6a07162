"""GGUF, the format of llama.cpp: a quantized model in one file, unpacked into a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smidgen.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def unpack(gguf: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer of a Llama-shaped GGUF into `folder`.

    transformers reads a GGUF as well, but its model cannot be saved, and with some packages present stays quantized. So
    it gives the config and the tokenizer here; the weights are dequantized by the format's own library.

    Raises:
        UserError: the file holds another architecture, or other tensors than its config says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if config.model_type != "llama":
        raise UserError(f"{gguf} holds a {config.model_type!r}; only Llama-shaped GGUF files can be unpacked.")
    model = AutoModelForCausalLM.from_config(config)
    _load_weights(model, gguf)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    _split_digits(tokenizer, gguf)
    tokenizer.save_pretrained(folder)


def _load_weights(model: PreTrainedModel, gguf: Path) -> None:
    """Fill the model's parameters from the file, which has each under llama.cpp's name for it."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)) or "", None)
            if tensor is None:
                raise UserError(f"{gguf} has no tensor for {name}.")
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = _halves_apart(weight, model.config.head_dim)
            parameter.copy_(weight)
    if stored:
        raise UserError(f"{gguf} has tensors that its model has no place for: {', '.join(sorted(stored))}.")


def _halves_apart(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key, (heads * head_dim, in): llama.cpp rotates neighbours, transformers halves."""
    reordered: torch.Tensor = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return reordered


def _split_digits(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Split digits off before anything else where the file says so (`smollm`), which transformers passes over.

    Without it the spaces before a number become other tokens than in training, and text with figures a worse fit.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits = Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
