"""Every cell of docs/matrix.md is what happens."""

from __future__ import annotations

import pytest

from smidgen import METHODS
from tests.matrix import KINDS, NOT_ASKED, PAGE, WORKS, cells, parse, render

STATED = parse(PAGE.read_text("utf-8"))


@pytest.mark.parametrize("technique", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_technique_does_what_the_page_says(kind: str, technique: str) -> None:
    assert cells(technique, kind) == STATED[kind][technique]


def test_the_page_is_as_its_command_writes_it() -> None:
    assert render(STATED) == PAGE.read_text("utf-8")


@pytest.mark.parametrize("claim", ["save", "detach", "recompute", "bf16", "Trainer"])
def test_what_can_be_attached_can(claim: str) -> None:
    """A refusal of these is one of the technique as a whole on that kind of model."""
    for kind, techniques in STATED.items():
        for found in techniques.values():
            assert (kind, claim) in NOT_ASKED or (found[claim] == WORKS) == (found["trains"] == WORKS)
