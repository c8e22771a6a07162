"""What a user can get wrong, told apart from what we can get wrong.

Exception
├── Interrupted         stopped on request; the message says how to go on
└── ValueError
    └── UserError       complete by itself: the command line prints it without a traceback
"""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """A mistake of the user's: the message names the value, what was wrong with it, and what would do."""


def difference(expected: Mapping[str, object], given: Mapping[str, object]) -> str:
    """What is missing of the names that are expected, and what is unknown of those given, the first three of each."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    return f"missing {', '.join(missing[:3]) or 'nothing'}; unknown {', '.join(unknown[:3]) or 'nothing'}"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped the work where it can be taken up again; the message says how."""
