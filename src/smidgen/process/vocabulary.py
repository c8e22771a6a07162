"""A tokenizer that is trained on a corpus: WordPiece to find masked tokens, byte-level BPE to find the next one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from smidgen.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Objective = Literal["masked", "causal"]

END = "<|endoftext|>"
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(
    texts: Iterator[str], size: int, objective: Objective, *, lowercase: bool, length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        texts: the corpus, in pieces.
        size: tokens of its vocabulary.
        objective: masked: WordPiece (Schuster & Nakajima, 2012) as BERT has it, [CLS] before and [SEP] after a text;
            causal: byte-level BPE (Radford et al., 2019, section 2.2), with <|endoftext|> between documents.
        lowercase: whether capitals and accents are dropped; in WordPiece alone.
        length: the most tokens of a text.

    Raises:
        UserError: the corpus has less than so many tokens' worth of different text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if objective == "masked":
        specials = list(SPECIAL.values())
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        least = f"at least {found}, its letters alone" if found > size else f"at most {found}"
        raise UserError(f"tokenizer.vocabulary={size} does not go with the corpus, whose text makes {least}.")
    if objective == "causal":
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=length
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **SPECIAL)
