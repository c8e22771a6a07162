from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smidgen.errors import UserError
from smidgen.process.data import Example
from smidgen.process.encoding import IGNORED, encode, pad_id

WORDS = ["question", "answer", ":", "the", "a", "of", "great", "small", "fish", "river", "red", "blue"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: a token a word, [CLS] before and [SEP] after."""
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)


def byte_tokenizer(single: str = "$A") -> PreTrainedTokenizerFast:
    """As GPT-2's with no merges: a token a byte; <end> ends a text, and there is no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<end>", "<start>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<end>", len(alphabet)), ("<start>", len(alphabet) + 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>")


WORD, BYTE = word_tokenizer(), byte_tokenizer()


def test_a_class_is_kept_with_the_tokens_that_the_tokenizer_gives():
    rows, cut = encode([Example("the great fish", label=1)], "classification", WORD, max_length=8)
    assert WORD.convert_ids_to_tokens(rows[0].input_ids) == ["[CLS]", "the", "great", "fish", "[SEP]"]
    assert (rows[0].labels, cut) == (1, 0)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20), st.integers(3, 12))
def test_a_long_text_is_truncated_as_its_tokenizer_would(words, max_length):
    text = " ".join(words)
    rows, cut = encode([Example(text, label=0)], "classification", WORD, max_length=max_length)
    assert rows[0].input_ids == WORD(text, truncation=True, max_length=max_length)["input_ids"]
    assert cut == (len(words) + 2 > max_length)


def test_a_long_text_loses_its_end_and_the_template_stays():
    rows, cut = encode(
        [Example("the great red fish", label=0), Example("fish", label=0)],
        "classification",
        WORD,
        max_length=7,
        template="question: {text} answer:",
    )
    tokens = [" ".join(WORD.convert_ids_to_tokens(row.input_ids)) for row in rows]
    assert tokens == ["[CLS] question : the answer : [SEP]", "[CLS] question : fish answer : [SEP]"]
    assert cut == 1


def decoded(ids: list[int]) -> str:
    return str(BYTE.decode([token for token in ids if token != IGNORED]))


def test_an_answer_follows_its_prompt_after_a_space_and_ends():
    rows, cut = encode([Example("Why?", answer="So.")], "generation", BYTE, max_length=99, template="Q: {text}\nA: ")
    (row,) = rows
    assert decoded(row.input_ids) == "Q: Why?\nA: So.<end>"
    assert isinstance(row.labels, list)
    assert decoded(row.labels) == " So.<end>"
    assert cut == 0


@pytest.mark.parametrize(
    ("template", "written"),
    [("{text}", "Why? So."), ("{text}\n", "Why?\nSo."), ("{text}:", "Why?: So."), ("{text}\t ", "Why?\tSo.")],
)
def test_a_space_stands_before_the_answer_unless_the_template_ends_in_a_break(template, written):
    rows, _ = encode([Example("Why?", answer="So.")], "generation", BYTE, max_length=99, template=template)
    assert decoded(rows[0].input_ids) == f"{written}<end>"


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@given(TEXTS.filter(str.strip), TEXTS, st.integers(8, 60))
def test_a_row_fits_and_its_labels_are_its_answers_tokens(text, answer, max_length):
    rows, cut = encode([Example(text, answer=answer)], "generation", BYTE, max_length=max_length)
    (row,) = rows
    assert isinstance(row.labels, list)
    assert len(row.input_ids) == len(row.labels) <= max_length
    start = row.labels.count(IGNORED)  # the prompt's last token is asked for the answer's first, its end for nothing
    assert start > 0
    assert row.labels == [IGNORED] * (start - 1) + row.input_ids[start:] + [IGNORED]
    whole = [*BYTE(f" {answer}")["input_ids"], BYTE.eos_token_id]
    assert row.input_ids[start:] == whole[: len(row.input_ids) - start]
    prompt = BYTE(text.rstrip(" "))["input_ids"]
    assert row.input_ids[:start] == prompt[:start]
    assert cut == (len(prompt) + len(whole) > max_length)


@given(TEXTS.filter(str.strip), TEXTS)
def test_a_prompt_has_the_same_tokens_with_and_without_its_answer(text, answer):
    known, unknown = (
        encode([example], "generation", BYTE, max_length=999)[0][0]
        for example in (Example(text, answer=answer), Example(text))
    )
    assert isinstance(known.labels, list)
    assert known.input_ids[: known.labels.count(IGNORED)] == unknown.input_ids
    assert unknown.labels == [IGNORED] * len(unknown.input_ids)


@pytest.mark.parametrize(
    ("text", "answer", "left"),
    [
        ("0123456789", "abc", "01234 abc<end>"),  # the text gives way first
        ("0123", "abcdefghi", "0123 abcde"),  # the text is short: the answer is cut, and does not end
        ("0123456789", "abcdefghi", "01234 abcd"),  # both are long: half each
    ],
)
def test_a_row_that_is_too_long_is_cut_in_the_text_first_then_in_the_answer(text, answer, left):
    rows, cut = encode([Example(text, answer=answer)], "generation", BYTE, max_length=10)
    assert decoded(rows[0].input_ids) == left
    assert cut == 1


def test_a_character_of_several_tokens_is_never_torn():
    rows, _ = encode([Example("\N{FISH}" * 5)], "generation", BYTE, max_length=10)
    assert decoded(rows[0].input_ids) == "\N{FISH}" * 2


def test_an_end_that_the_tokenizer_adds_does_not_close_a_prompt():
    tokenizer = byte_tokenizer("<start> $A <end>")
    for text, left in (("ab", "<start>ab x<end>"), ("abcdefgh", "<start>ab x<end>")):
        rows, _ = encode([Example(text, answer="x")], "generation", tokenizer, max_length=6)
        assert tokenizer.decode(rows[0].input_ids) == left


def test_a_row_without_a_class_has_nothing_to_learn():
    assert encode([Example("fish")], "classification", WORD, max_length=8)[0][0].labels == IGNORED


def test_no_rows_are_no_rows():
    assert encode([], "generation", BYTE, max_length=8) == ([], 0)


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(UserError, match=r"takes 6 tokens and leaves no room for a text in 6\. Shorten it, or raise"):
        encode([Example("fish")], "classification", WORD, max_length=6, template="question: {text} answer:")
    silent = word_tokenizer()
    silent.add_special_tokens({"eos_token": "[SEP]"})
    silent.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(UserError, match=r"The text '\\t' has no token"):
        encode([Example("\t", answer="fish")], "generation", silent, max_length=6)
    with pytest.raises(UserError, match="has no end-of-text token"):
        encode([Example("a", answer="b")], "generation", WORD, max_length=8)


def test_padding_falls_back_to_end_of_text():
    assert pad_id(WORD) == 0
    assert pad_id(BYTE) == BYTE.eos_token_id
