"""Things counted and named in sentences."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def counted(things: Collection[object], name: str) -> str:
    """How many there are: 1 row, 1,200 rows."""
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def some(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: a, b and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
