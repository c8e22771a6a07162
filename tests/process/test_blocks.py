"""Blocks hold every token of a stream once, hide what the papers hide, and come in a random order that is no list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.placeholders import IGNORED
from smidgen.process.blocks import VALIDATION, Blocks, Causal, CorpusRows, Masked, shuffle
from smidgen.process.corpus import CONTINUES
from tests.process.test_encoding import BYTE, WORD

MASK, END, SIZE = 3, 4, 1000


def masked(length: int = 52, share: float = 0.15, *, whole_words: bool = True, seed: int = 0) -> Masked:
    return Masked(
        length=length,
        share=share,
        whole_words=whole_words,
        seed=seed,
        mask=MASK,
        vocabulary=SIZE,
        never=(0, 1, 2, MASK, END),
        before=(1,),
        after=(2,),
    )


def stream(tokens: int, word: int = 1) -> np.ndarray:
    """Tokens from 10 on, in words of so many."""
    numbers = 10 + np.arange(tokens, dtype="<u4") % (SIZE - 10)
    numbers[np.arange(tokens) % word > 0] |= CONTINUES
    return numbers


@given(st.integers(2, 200), st.integers(1, 20))
def test_causal_blocks_hold_every_token_once_and_answer_with_the_next(tokens: int, length: int) -> None:
    text, task = stream(tokens, word=2), Causal(length)
    rows = list(map(Blocks(text, task, 0).__getitem__, range(task.count(text))))
    assert len(rows) == (tokens - 1) // length
    plain = [int(token & ~CONTINUES) for token in text]
    assert [token for row in rows for token in row.input_ids] == plain[: len(rows) * length]
    assert [label for row in rows for label in row.labels] == plain[1 : len(rows) * length + 1]


@given(st.integers(1, 5), st.floats(0.01, 0.9), st.booleans(), st.integers(0, 9))
def test_masks_hide_whole_words_up_to_the_share(word: int, share: float, whole_words: bool, epoch: int) -> None:
    task, text = masked(share=share, whole_words=whole_words), stream(500, word)
    row = Blocks(text, task, epoch)[3]
    tokens = [int(token & ~CONTINUES) for token in text[150:200]]
    assert (row.input_ids[0], row.input_ids[-1], len(row.input_ids)) == (1, 2, 52)
    assert (row.labels[0], row.labels[-1]) == (IGNORED, IGNORED)
    hidden = np.array(row.labels[1:-1]) != IGNORED
    plain = np.array(tokens)
    np.testing.assert_array_equal(np.array(row.labels[1:-1])[hidden], plain[hidden])
    np.testing.assert_array_equal(np.array(row.input_ids[1:-1])[~hidden], plain[~hidden])
    wanted = max(1, round(share * 50))
    assert wanted - (word if whole_words else 1) < hidden.sum() <= wanted
    if whole_words and word <= wanted:
        starts = np.flatnonzero((text[150:200] & CONTINUES) == 0)
        for first, last in zip([0, *starts], [*starts, 50], strict=True):
            assert len(set(hidden[first:last])) <= 1


def test_of_the_hidden_tokens_eight_in_ten_are_masks_one_is_drawn_and_one_stays() -> None:
    task, text = masked(share=0.5), stream(20_000)
    counts = np.zeros(3)
    for number in range(task.count(text)):
        row = task.block(text, number, 0)
        for shown, label in zip(row.input_ids, row.labels, strict=True):
            if label != IGNORED:
                counts += [shown == MASK, shown == label, shown not in (MASK, label)]
    np.testing.assert_allclose(counts / counts.sum(), [0.8, 0.1, 0.1], atol=0.01)


def test_text_without_white_space_is_hidden_token_by_token() -> None:
    row = masked(share=0.2).block(stream(50, word=50), 0, 0)
    assert sum(label != IGNORED for label in row.labels) == 10


def test_what_stands_between_documents_is_never_hidden() -> None:
    text = np.full(50, END, dtype="<u4")
    text[7] = 99
    row = masked(share=0.9).block(text, 0, 0)
    assert [place for place, label in enumerate(row.labels) if label != IGNORED] == [8]


def test_masks_change_with_the_epoch_and_the_block_and_with_nothing_else() -> None:
    text = stream(500)
    first = masked().block(text, 2, 0)
    assert masked().block(text, 2, 0) == first
    for other in (masked().block(text, 2, 1), masked().block(text, 2, VALIDATION), masked(seed=1).block(text, 2, 0)):
        assert other.labels != first.labels
    same = masked().block(np.tile(text[:50], 10), 3, 0)
    assert same.labels != masked().block(text, 0, 0).labels


def test_what_a_tokenizer_puts_around_a_text_is_around_a_block() -> None:
    WORD.mask_token = "blue"
    task = Masked.of(WORD, length=10, share=0.2, whole_words=True, seed=0)
    assert (task.before, task.after, task.room) == ((2,), (3,), 8)
    with pytest.raises(ValueError, match="has no mask token"):
        Masked.of(BYTE, length=10, share=0.2, whole_words=True, seed=0)


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_an_order_has_every_number_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(map(shuffle(count, [seed, epoch]), range(count))) == list(range(count))


def test_an_order_looks_random() -> None:
    count = 10_000
    order = np.array([shuffle(count, [0, 0])(number) for number in range(count)])
    other = np.array([shuffle(count, [0, 1])(number) for number in range(count)])
    for one, two in ((order, np.arange(count)), (order, other), (order[1:], order[:-1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_an_order_of_any_length_takes_no_time() -> None:
    assert 0 <= shuffle(10**15, [3, 0])(10**15 - 1) < 10**15


@given(st.integers(4, 300), st.integers(1, 9), st.integers(1, 7), st.integers(0, 3))
def test_the_parts_of_an_epoch_hold_every_block_once(tokens: int, batch_size: int, parts: int, epoch: int) -> None:
    rows = CorpusRows(stream(tokens), Causal(3), batch_size, seed=1, scorings=parts)
    parts = rows.parts
    batches = [rows.batches(epoch * parts + part) for part in range(parts)]
    assert all(map(len, batches))
    found = [own[place] for own in batches for place in range(len(own))]
    blocks = (tokens - 1) // 3
    assert sorted(number for batch in found for number in batch) == list(range(blocks))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
