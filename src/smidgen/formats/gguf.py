"""GGUF, the format of llama.cpp: a quantized model in one file, unpacked into a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def unpack(path: Path, folder: Path) -> None:
    """Write the config, float32 weights and tokenizer of a Llama-shaped GGUF into `folder`.

    transformers reads a GGUF too, but how changes with its version: the model cannot be saved, or stays quantized when
    some package is present; 5.3 gives it another model's tokenizer. So only the config is taken from there.

    Raises:
        UserError: the file holds another kind of model or tokenizer, or other tensors than its config says.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type != "llama":
        raise UserError(f"{path} holds a {config.model_type!r}; only Llama-shaped models can be unpacked.")
    file = GGUFReader(path)
    tokenizer = _tokenizer(file, path)
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config)
    _load_weights(model, file, path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_weights(model: PreTrainedModel, file: GGUFReader, path: Path) -> None:
    """Fill the model's parameters from the file, which has each under llama.cpp's name for it."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in file.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)) or "", None)
            if tensor is None:
                raise UserError(f"{path} has no tensor for {name}.")
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = _halves_apart(weight, model.config.head_dim)
            parameter.copy_(weight)
    if stored:
        raise UserError(f"{path} has tensors that its model has no place for: {', '.join(sorted(stored))}.")


def _halves_apart(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key, (heads * head_dim, in): llama.cpp rotates neighbours, transformers halves."""
    reordered: torch.Tensor = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return reordered


def _tokenizer(file: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer that the file describes: byte-level pairs, with numbers split into digits before all else."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def stored(name: str) -> Any:
        field = file.get_field(f"tokenizer.{name}")
        return None if field is None else field.contents()

    if (kind := (stored("ggml.model"), stored("ggml.pre"))) != ("gpt2", "smollm"):
        raise UserError(f"{path} has a tokenizer of the kind {kind}; only ('gpt2', 'smollm') can be unpacked.")
    words = stored("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in stored("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, stored("ggml.token_type"), strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=stored("chat_template"),
        bos_token=words[stored("ggml.bos_token_id")],
        eos_token=words[stored("ggml.eos_token_id")],
        unk_token=words[stored("ggml.unknown_token_id")],
        pad_token=words[stored("ggml.padding_token_id")],
    )
