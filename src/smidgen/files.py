"""Files that are either whole or not there: atomic writes, hashes, and JSON read strictly."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from smidgen.errors import UserError

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "._*", ".nfs*")
"""What a system puts into folders by itself, as patterns of names."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically and durably: a reader sees the old file or the new one, never a part.

    Raises:
        UserError: the disk is full; the old file is still whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with _told_when_full(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, as `write_text` does; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `path`, otherwise nothing is left behind.

    A folder that is there already is replaced only by one that has all of its files.

    Raises:
        UserError: the disk is full, `path` is a file, or it is a folder with other files, which would be lost; what was
            at `path` is still whole.
    """
    path = path.resolve() if path.is_symlink() else path.absolute()  # a link stays, and what it leads to is replaced
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written there. Name another folder, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with _told_when_full(path):
            yield temporary
            for file in temporary.rglob("*"):
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        sync_folder(temporary)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _replace_folder(new: Path, path: Path) -> None:
    """Move the folder `new` to `path`; a folder cannot replace a full one in one step, so the old one steps aside."""
    from filelock import FileLock

    lock = path.parent / f".{path.name}.lock"
    try:
        with FileLock(lock):  # of several that write it at the same time, the last one's stays
            check_replaceable(path, {file.name for file in new.iterdir()})
            _exchange(new, path)
    finally:
        lock.unlink(missing_ok=True)


def check_replaceable(path: Path, names: Collection[str]) -> None:
    """Raise a UserError if a folder has more than files of these names, and what a system puts there by itself."""
    there = [file.name for file in path.iterdir()] if path.is_dir() else []
    there = [name for name in there if not any(fnmatch.fnmatchcase(name, known) for known in LITTER)]
    if others := sorted(name for name in there if name not in names):
        raise UserError(
            f"{path} has other files, which would be lost: {', '.join(others[:5])}. Name a folder that is not there."
        )


def _exchange(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.rename(old / path.name)
    try:
        new.rename(path)
    except BaseException:
        (old / path.name).rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_in(folder: Path) -> list[Path]:
    """What is in a folder, but what is hidden, by name."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def sampled(folder: Path) -> str:
    """A hash of the files in a folder: of their names, their sizes, and evenly spaced pieces of each.

    Files of up to a megabyte count whole. Weights that were trained differ nearly everywhere, and are told apart.
    """
    digest = hashlib.sha256()
    for path in filter(Path.is_file, shown_in(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        pieces = 256 if size > 1 << 20 else 1
        with path.open("rb") as file:
            for piece in range(pieces):
                file.seek(piece * size // pieces)
                digest.update(file.read(4096 if pieces > 1 else size))
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON strictly: a duplicate key, NaN or infinity is an error.

    Raises:
        UserError: the file is missing or is not such JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON: {error}. It was changed or cut short after it was written."
        ) from None


def once(path: Path, known: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, kept in a JSON file as long as what it is of stays the same.

    Args:
        path: the file.
        known: what it is of; kept beside it.
        measure: gives fields of other names.
    """
    kept: dict[str, Any] = read_json(path) if path.is_file() else {}
    if not kept.items() >= known.items():
        kept = {**measure(), **known}
        write_json(path, kept)
    return kept


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, as `object_pairs_hook` of the json module takes it.

    Raises:
        ValueError: a key appears twice, of which json would silently take the last.
    """
    seen = dict(pairs)
    if len(seen) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON allows")


@contextlib.contextmanager
def _told_when_full(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"No space is left on the disk for {path}; nothing there was changed. Free some, or write elsewhere."
        ) from error


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full; safetensors' own error has the system's words alone."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` durable; a system that cannot sync a folder is left as it is."""
    with contextlib.suppress(PermissionError):
        _sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
