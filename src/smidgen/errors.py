"""What a user can get wrong, told apart from what we can get wrong.

ValueError
└── UserError           complete by itself: the command line prints it without a traceback
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: the message names the value, what was wrong with it, and what would do."""
