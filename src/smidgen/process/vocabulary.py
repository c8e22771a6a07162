"""A tokenizer that is trained on a corpus: byte-level BPE (Radford et al., 2019, section 2.2), which knows every text.

Not WordPiece: the trainer that we would use for it breaks ties by chance, so that two runs of one recipe would differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from smidgen.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Objective = Literal["masked", "causal"]

SPECIAL: dict[Objective, dict[str, str]] = {
    "masked": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "causal": {"pad_token": "<|pad|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}
"""To find masked tokens, a text stands between [CLS] and [SEP]; to find the next one, <|endoftext|> ends it."""


def train_tokenizer(
    texts: Iterator[str], size: int, objective: Objective, *, lowercase: bool, length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; the same texts give the same one.

    Args:
        texts: the corpus, in pieces.
        size: tokens of its vocabulary.
        objective: which special tokens it has.
        lowercase: whether capitals are made small.
        length: the most tokens of a text.

    Raises:
        UserError: the corpus has less different text than makes so many tokens, or so few do not hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL[objective]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase() if lowercase else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found > size:
        raise UserError(f"tokenizer.vocabulary={size} does not hold the {found} tokens that bytes alone make.")
    if found < size:
        raise UserError(f"tokenizer.vocabulary={size} is more than the text makes. It makes {found} at most.")
    if objective == "masked":
        around = [(token, tokenizer.token_to_id(token)) for token in (special["cls_token"], special["sep_token"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)
