"""A folder of results belongs to one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from smidgen.errors import UserError
from smidgen.process.parallel import this_process


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Inside, no other process may write the same results; the lock ends with the process, however it ends.

    Of several that train together the first holds it for all.

    Args:
        folder: where the results go; it is made if it is not there.

    Raises:
        UserError: another process is inside.
    """
    from filelock import FileLock, Timeout

    if not this_process().is_main_process:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"output={str(folder)!r} is a file. Give a folder.") from error
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink()  # within: whoever waits for it would find it gone, and nobody waits
    except Timeout as error:
        raise UserError(f"Another smidgen is at work in {folder}. Wait for it, or give another output.") from error
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
