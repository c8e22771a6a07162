"""Bytes that took time to compute, kept on disk for this run and others: many small entries, in a file for each origin.

Files are written once, and the ones not used for longest make room for new ones. They are read, not mapped: the
system's cache keeps what fits, and a run's memory is its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

SHARE = 0.1
"""How much may be kept, of what the disk has free and what is kept already."""

PATIENCE = 0.5
"""Seconds between two looks at whether to wait for another process any longer."""

SUFFIX = ".states"

ABANDONED = 3600.0
"""Seconds after which a file that is not yet whole is no longer being written."""


Asked = Callable[[], object]
"""Whether to give the work up."""


class StoppedError(Exception):
    """The work was given up."""


@contextlib.contextmanager
def _alone(path: Path, stopped: Asked) -> Iterator[None]:
    """Inside, no other process is; the lock's file goes with the first, and whoever comes then computes again."""
    lock = FileLock(path)
    while not lock.is_locked:
        if stopped():
            raise StoppedError
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


class Shelf:
    """Entries by key, those of each file by what they come from.

    Args:
        folder: of the files; other processes may use it at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[BinaryIO] = []
        self._places: dict[bytes, tuple[BinaryIO, int]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def put(
        self,
        origin: str,
        sizes: Mapping[bytes, int],
        computed: Iterator[tuple[bytes, memoryview]],
        *,
        stopped: Asked = lambda: False,
    ) -> str | None:
        """Make entries readable: those of a file of the same origin and keys, or else new ones.

        Of several processes that want the same, one computes them and the others wait.

        Args:
            origin: what they come from.
            sizes: of each entry, in bytes.
            computed: each key and its bytes, in any order; not asked if the file is there.
            stopped: whether to wait for the others no longer.

        Returns:
            Why that cannot be, in a sentence; None: it is done.

        Raises:
            StoppedError: it was given up.
        """
        if not sizes:
            return None
        name = hashlib.sha256(b"".join([origin.encode(), *sizes])).hexdigest()
        path, needed = self.folder / f"{name}{SUFFIX}", sum(sizes.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(path.with_suffix(".lock"), stopped):
                if not path.is_file() or path.stat().st_size != needed:
                    if not self._has_room(needed):
                        return f"{needed / 1e9:.1f} GB of states are more than {SHARE:.0%} of the disk's free space."
                    self._write(path, sizes, computed)
                self._open(path, sizes)
        except OSError as error:
            return f"States cannot be kept in {self.folder}: {error.strerror}."
        return None

    def read(self, key: bytes, into: Any) -> None:
        """Fill a writable buffer with an entry, which has its size."""
        file, start = self._places[key]
        file.seek(start)
        if file.readinto(into) != len(memoryview(into).cast("B")):  # type: ignore[attr-defined]
            raise RuntimeError(f"{file.name} was cut short while it was read.")

    def close(self) -> None:
        """Forget the entries; their files stay."""
        for file in self._files:
            file.close()
        self._files, self._places = [], {}

    def _open(self, path: Path, sizes: Mapping[bytes, int]) -> None:
        file = path.open("rb")  # stays readable if another process makes room
        os.utime(path)
        self._files.append(file)
        start = 0
        for key, size in sizes.items():
            self._places[key] = (file, start)
            start += size

    def _write(self, path: Path, sizes: Mapping[bytes, int], computed: Iterator[tuple[bytes, memoryview]]) -> None:
        starts, start = {}, 0
        for key, size in sizes.items():
            starts[key] = start
            start += size
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new.")
        try:
            with os.fdopen(handle, "wb") as file:
                for key, content in computed:
                    file.seek(starts[key])
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _has_room(self, needed: int) -> bool:
        """Remove the files that were not used for longest until the new one may be kept, if it may at all."""
        kept, mine = [], {file.name for file in self._files}
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # by another process
                found = file.stat()
                is_written = file.suffix != SUFFIX and time.time() - found.st_mtime < ABANDONED
                if str(file) not in mine and not is_written:
                    kept.append((found.st_mtime, found.st_size, file))
        kept.sort()
        total = sum(size for _, size, _ in kept)
        allowed = SHARE * (shutil.disk_usage(self.folder).free + total)
        if needed > allowed:
            return False
        for _, size, file in kept:
            if total + needed <= allowed:
                break
            file.unlink(missing_ok=True)
            total -= size
        return True
