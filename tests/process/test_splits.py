from __future__ import annotations

import random
from collections import Counter

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from smidgen.process.splits import normalize, set_aside, together

ROWS = st.lists(st.tuples(st.sampled_from("ABCDEFGHIJ ab"), st.sampled_from("xyz")), min_size=1, max_size=60)
SHARES = st.floats(0.01, 0.9)
SEEDS = st.integers(0, 5)


def chosen(rows: list[tuple[str, str]], share: float, seed: int) -> list[int]:
    return set_aside([text for text, _ in rows], [(label,) for _, label in rows], share, seed=seed)


@given(ROWS, SHARES, SEEDS)
def test_no_text_is_on_both_sides(rows, share, seed):
    rows_chosen = set(chosen(rows, share, seed))
    aside = {normalize(rows[row][0]) for row in rows_chosen}
    assert all((normalize(text) in aside) == (row in rows_chosen) for row, (text, _) in enumerate(rows))


@given(ROWS, SHARES, SEEDS)
def test_every_label_stays_in_training(rows, share, seed):
    aside = set(chosen(rows, share, seed))
    assert {label for row, (_, label) in enumerate(rows) if row not in aside} == {label for _, label in rows}


@given(ROWS, SHARES, SEEDS)
def test_something_is_chosen_whenever_a_text_can_be_spared(rows, share, seed):
    texts: dict[str, set[str]] = {}
    for text, label in rows:
        texts.setdefault(normalize(text), set()).add(label)
    count = Counter(label for labels in texts.values() for label in labels)
    spare = any(all(count[label] > 1 for label in labels) for labels in texts.values())
    assert bool(chosen(rows, share, seed)) == spare


@given(ROWS, SHARES, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows, share, seed, random):
    shuffled = rows.copy()
    random.shuffle(shuffled)
    assert sorted(rows[row] for row in chosen(rows, share, seed)) == sorted(
        shuffled[row] for row in chosen(shuffled, share, seed)
    )


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.floats(0.05, 0.5), SEEDS)
def test_each_label_gives_its_share_to_within_a_row(sizes, share, seed):
    labels = [str(label) for label, size in enumerate(sizes) for _ in range(size)]
    aside = set_aside([f"text {row}" for row in range(len(labels))], [(own,) for own in labels], share, seed=seed)
    given = Counter(labels[row] for row in aside)
    for label, size in enumerate(sizes):
        assert abs(given[str(label)] - share * size) <= 1 + 1e-6
    assert abs(len(aside) - share * len(labels)) <= 1 + 1e-6


def test_another_seed_chooses_other_rows():
    texts, labels = [f"text {row}" for row in range(200)], [("x",), ("y",)] * 100
    assert set_aside(texts, labels, 0.2, seed=0) != set_aside(texts, labels, 0.2, seed=1)


def test_a_text_that_takes_half_of_the_rows_is_not_torn_apart():
    texts = ["same"] * 50 + [f"text {row}" for row in range(50)]
    aside = set_aside(texts, [("",)] * 100, 0.1, seed=0)
    assert aside
    assert len({texts[row] == "same" for row in aside}) == 1


def test_duplicates_are_told_by_letters_not_by_case_or_space():
    assert normalize(" Ｆull\u00a0WIDTH\n straße ") == normalize("full width STRASSE")
    assert normalize("a b") != normalize("ab")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=40))
def test_what_shares_a_text_or_a_group_stays_together(pairs):
    texts, groups = [f"Text {text}" for text, _ in pairs], [f"group {group}" for _, group in pairs]
    found = together(texts, groups)
    assert sorted(row for rows in found.values() for row in rows) == list(range(len(pairs)))
    place = {row: name for name, rows in found.items() for row in rows}
    for one in range(len(pairs)):
        for other in range(one):
            if pairs[one][0] == pairs[other][0] or pairs[one][1] == pairs[other][1]:
                assert place[one] == place[other]
    linked = nx.Graph([(("text", text), ("group", group)) for text, group in pairs])
    assert len(found) == nx.number_connected_components(linked)


def test_no_group_is_parted():
    draw = random.Random(0)
    groups = [f"person {draw.randrange(40)}" for _ in range(200)]
    texts, labels = [f"text {row}" for row in range(200)], [draw.choice("ab") for _ in range(200)]
    aside = set_aside(texts, labels, 0.2, seed=0, groups_of=groups)
    assert not {groups[row] for row in aside} & {groups[row] for row in set(range(200)) - set(aside)}
    assert 25 <= len(aside) <= 55
    order = draw.sample(range(200), 200)
    mixed = ([column[row] for row in order] for column in (texts, labels, groups))
    again = set_aside(next(mixed), next(mixed), 0.2, seed=0, groups_of=next(mixed))
    assert sorted(order[row] for row in again) == aside
