"""A folder of results belongs to one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from smidgen.errors import UserError


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Inside, no other process may write the same results; the lock ends with the process, however it ends.

    Args:
        folder: where the results go; it is made if it is not there.
        what: runs, such as "A comparison".

    Raises:
        UserError: another process is inside.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{what} is running in {folder} already. Wait for it, or give another output.") from error
