from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smidgen.process.batches import by_length, collate, idle, micro_batches, order, pieces
from smidgen.process.encoding import IGNORED, Encoded

LENGTHS = st.lists(st.integers(1, 50), max_size=200)
SIZES = st.integers(1, 20)
SEEDS = st.integers(0, 2**32 - 1)


@given(LENGTHS, SIZES, SEEDS, st.integers(0, 9))
def test_each_row_is_in_exactly_one_batch(lengths, batch_size, seed, epoch):
    batches = order(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))


@given(LENGTHS, SIZES, SEEDS)
def test_only_the_last_batch_may_be_smaller(lengths, batch_size, seed):
    sizes = [len(batch) for batch in order(lengths, batch_size, seed=seed, epoch=0)]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(0 < size <= batch_size for size in sizes[-1:])


@given(LENGTHS, SIZES, SEEDS, st.integers(0, 9))
def test_the_order_is_a_pure_function_of_seed_and_epoch(lengths, batch_size, seed, epoch):
    first, again = (order(lengths, batch_size, seed=seed, epoch=epoch) for _ in range(2))
    assert first == again


def test_another_epoch_and_another_seed_have_another_order():
    orders = [order([5] * 100, 10, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(batches) for batches in orders}) == 9


def test_rows_of_a_batch_are_of_similar_length():
    lengths = [int(length) for length in torch.randint(5, 100, (2000,), generator=torch.Generator().manual_seed(0))]
    batches = order(lengths, 16, seed=0, epoch=0)
    real = sum(lengths)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert real / padded > 0.95
    shuffled = sum(16 * max(lengths[start : start + 16]) for start in range(0, 2000, 16))
    assert real / shuffled < 0.6


def test_long_and_short_batches_come_mixed():
    lengths = list(range(1, 1601))
    longest = [max(lengths[row] for row in batch) for batch in order(lengths, 16, seed=0, epoch=0)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_rows_meet_others_in_the_next_epoch():
    lengths = list(range(400))
    first, second = ({frozenset(batch) for batch in order(lengths, 8, seed=0, epoch=epoch)} for epoch in range(2))
    assert not first & second


@given(LENGTHS, SIZES)
def test_evaluation_takes_every_row_once_and_the_longest_first(lengths, batch_size):
    batches = by_length(lengths, batch_size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(LENGTHS, SIZES, st.none() | st.integers(1, 100))
def test_a_piece_is_as_long_as_it_may_be(lengths, most_rows, most_tokens):
    batches = by_length(lengths, most_rows, most_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    assert all(len(batch) <= most_rows for batch in batches)
    assert all(
        tokens <= (most_tokens or tokens) or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True)
    )
    for batch in batches[:-1]:
        more = (len(batch) + 1) * lengths[batch[0]]
        assert len(batch) == most_rows or (most_tokens is not None and more > most_tokens)


def test_rows_that_are_not_sorted_are_padded_to_the_longest_so_far():
    assert pieces([4, 5, 6, 7], [1, 3, 2, 5], 9, 6) == [[4, 5], [6], [7]]


@given(
    st.lists(st.integers(), min_size=1, max_size=40, unique=True),
    st.integers(1, 9),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 60),
)
def test_all_processes_take_part_equally_often_and_each_row_is_passed_once(batch, processes, micro_batch_size, tokens):
    lengths = [1 + abs(row) % 30 for row in batch]
    parts = [
        micro_batches(
            batch, lengths, process=process, processes=processes, most_rows=micro_batch_size, most_tokens=tokens
        )
        for process in range(processes)
    ]
    assert sorted(row for part in parts for piece in part for row in piece) == sorted(batch)
    assert len({len(part) for part in parts}) == 1
    assert parts[0][0]
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(piece) <= (micro_batch_size or len(batch)) for part in parts for piece in part)


def test_one_process_without_micro_batches_takes_the_batch_as_it_is():
    assert micro_batches([3, 1, 2], [5, 6, 7]) == [[3, 1, 2]]


def test_a_process_without_rows_gets_empty_pieces():
    assert micro_batches([7], [4], process=1, processes=2) == [[]]


CLASSES = [Encoded([5, 6, 7], 1), Encoded([8], 0)]
TOKENS = [Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8], [8])]


def test_classes_are_padded_to_the_longest_row():
    batch = collate(CLASSES, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("side", "ids", "labels"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]),
    ],
)
def test_padding_goes_to_its_side_and_has_no_label(side, ids, labels):
    batch = collate(TOKENS, pad_id=9, side=side)
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == [[int(token != 9) for token in row] for row in ids]


@pytest.mark.parametrize("rows", [CLASSES, TOKENS], ids=["classes", "tokens"])
def test_an_idle_row_has_no_loss_and_no_gradient(rows):
    batch = collate([idle(row) for row in rows], pad_id=9)
    logits = torch.zeros(*batch["labels"].shape, 10, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert batch["input_ids"].tolist() == collate(rows, pad_id=9)["input_ids"].tolist()


@given(st.integers(1, 12), st.integers(1, 4), st.none() | st.integers(1, 4), st.none() | st.integers(1, 30))
def test_the_pieces_of_all_processes_have_the_loss_of_the_whole_batch(count, processes, most_rows, most_tokens):
    generator = torch.Generator().manual_seed(count)
    rows = [Encoded([row] * (row + 1), [row % 3] * (row + 1)) for row in range(count)]
    table = torch.randn(count, 3, generator=generator, dtype=torch.float64)

    def loss(piece: list[Encoded]) -> torch.Tensor:
        batch = collate(piece, pad_id=0)
        logits = table[batch["input_ids"]]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    batch = list(range(count))
    summed = sum(
        loss([rows[row] for row in piece] or [idle(rows[batch[-1]])])
        for process in range(processes)
        for piece in micro_batches(
            batch,
            [len(row.input_ids) for row in rows],
            process=process,
            processes=processes,
            most_rows=most_rows,
            most_tokens=most_tokens,
        )
    )
    torch.testing.assert_close(summed, loss(rows))
