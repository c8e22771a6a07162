"""What a user can get wrong, told apart from what we can get wrong.

Exception
├── Interrupted         stopped on request; the message says how to go on
└── ValueError
    └── UserError       complete by itself: the command line prints it without a traceback
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: the message names the value, what was wrong with it, and what would do."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped the work where it can be taken up again; the message says how."""
