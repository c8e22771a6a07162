"""A corpus of text files as two streams of tokens on the disk, to train on and to validate on, in a bounded memory.

The files are read a page at a time: some kilobytes of text, up to white space, or longer where there is none. The
pages of all documents are counted through, and every so many-th of them goes to the validation stream, as the share
asks. A stream is a file of 32-bit numbers: the token, and in the top bit whether it goes on with the word of the token
before it. A document ends with a token of its own; the documents stand one after the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smidgen import embedded, files
from smidgen.errors import UserError
from smidgen.process.problems import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_PAGE = 1 << 16
"""Characters of a page; fewer in a small corpus, so that there are pages enough to set some aside."""

PAGES = 400
"""How many pages a corpus has at least, if its text suffices."""

LONGEST_WORD = 1 << 16
"""Characters without white space before a page may be cut inside a word, as in languages that write none."""

CONTINUES = np.uint32(1 << 31)
"""The bit of a token that goes on with the word of the token before it."""

DESCRIPTION = "tokens.json"

Numbers = NDArray[np.uint32]


class Page(NamedTuple):
    """Some text of a document, and whether the document ends with it."""

    text: str
    ends: bool


def text_files(sources: Sequence[str], *, field: str = "corpus") -> list[Path]:
    """The files of a corpus, each once, by source and name.

    Args:
        sources: files, folders, which stand for the .txt files in them, patterns such as texts/*.txt, and
            embedded:sotu.
        field: of the recipe, which names them.

    Raises:
        UserError: a source names no file.
    """
    found: dict[Path, None] = {}
    for source in sources:
        place = embedded.corpus_folder(source.removeprefix("embedded:")) if source.startswith("embedded:") else None
        path = place or Path(source)
        if path.is_dir():
            own = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".txt")
        elif path.is_file():
            own = [path]
        else:
            parts = path.parts
            fixed = next((n for n, part in enumerate(parts) if any(letter in part for letter in "*?[")), len(parts))
            own = sorted(Path(*parts[:fixed]).glob("/".join(parts[fixed:]))) if fixed < len(parts) else []
        own = [file for file in own if file.is_file()]
        if not own:
            raise UserError(f"{field} {shown(source)} names no text file: give files, patterns, or a folder with .txt.")
        found |= dict.fromkeys(own)
    return list(found)


def text_hash(sources: Sequence[str], *, field: str) -> str:
    """SHA-256 of all files of a corpus; one is read again only where its size or its time has changed.

    Args:
        sources: see `text_files`.
        field: likewise.

    Raises:
        UserError: a source names no file.
    """
    found = [(path, path.stat()) for path in text_files(sources, field=field)]
    hashes = [_hash_of(path, (at.st_size, at.st_mtime_ns)) for path, at in found]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.cache
def _hash_of(path: Path, _: tuple[int, int]) -> str:
    return files.sha256(path)


def pages(paths: Sequence[Path]) -> Iterator[Page]:
    """The text of all files, page by page.

    Raises:
        UserError: a file is not UTF-8 text.
    """
    size = min(LARGEST_PAGE, max(200, sum(path.stat().st_size for path in paths) // PAGES))
    for path in paths:
        yield from _pages_of(path, size)


def _pages_of(path: Path, size: int) -> Iterator[Page]:
    rest = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while more := file.read(size):
                if "\0" in more:
                    raise UserError(f"{path} is no text: it holds a zero byte.")
                rest += more
                cut = max(rest.rfind("\n"), rest.rfind(" "))  # white space goes with the word after it
                if cut <= 0:
                    cut = len(rest) if len(rest) > LONGEST_WORD else 0
                if rest[:cut].strip() or cut > LONGEST_WORD:
                    yield Page(rest[:cut], ends=False)
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}. Save it as UTF-8, or leave it out.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    yield Page(rest, ends=True)


class Streams(NamedTuple):
    """The two streams of a corpus, mapped from the disk, and the SHA-256 of both."""

    train: Numbers
    validation: Numbers
    fingerprint: str


def write_streams(
    folder: Path,
    paths: Sequence[Path],
    validation: Sequence[Path] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end: int,
    share: float,
) -> Streams:
    """Turn a corpus into streams of tokens in a folder, or open those that are there from a run that was stopped.

    Args:
        folder: where they go.
        paths: the files to train on.
        validation: the files to validate on; None: a share of the pages of the others.
        tokenizer: a fast one.
        end: the token at the end of a document.
        share: of the pages, if they are set aside.

    Raises:
        UserError: the tokenizer is not a fast one, or the corpus has too little text.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer, which tells words apart.")

    def aside(number: int) -> bool:
        """Whether a page is one of the share."""
        return validation is None and int((number + 1.5) * share) > int((number + 0.5) * share)

    source = _described(paths, validation, tokenizer, end, share)
    if not _is_whole(folder, source):
        with files.new_folder(folder) as new:
            with (new / "train").open("wb") as train, (new / "validation").open("wb") as held:
                for number, tokens in enumerate(tokens_of(_parted(pages(paths), aside), tokenizer, end)):
                    (held if aside(number) else train).write(tokens.tobytes())
                for tokens in tokens_of(pages(validation or []), tokenizer, end):
                    held.write(tokens.tobytes())
            hashes = [files.sha256(new / name) for name in ("train", "validation")]
            files.write_json(
                new / DESCRIPTION, source | {"sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}
            )
    return open_streams(folder)


def open_streams(folder: Path) -> Streams:
    """The streams that were written to a folder."""
    return Streams(
        _mapped(folder / "train"), _mapped(folder / "validation"), files.read_json(folder / DESCRIPTION)["sha256"]
    )


def _parted(found: Iterable[Page], aside: Callable[[int], bool]) -> Iterator[Page]:
    """The pages, ended where the next one goes to the other stream: what follows there is not what came after."""
    for number, page in enumerate(found):
        yield page._replace(ends=page.ends or aside(number) != aside(number + 1))


def _described(
    paths: Sequence[Path],
    validation: Sequence[Path] | None,
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    share: float,
) -> dict[str, object]:
    """What the streams depend on; of a file its length and its time, since reading it all again may take hours."""

    def known(paths: Sequence[Path]) -> list[list[object]]:
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "files": known(paths),
        "validation": None if validation is None else known(validation),
        "vocabulary": hashlib.sha256(words.encode()).hexdigest(),
        "end": end,
        "share": share if validation is None else None,
    }


def _is_whole(folder: Path, source: dict[str, object]) -> bool:
    if not (folder / DESCRIPTION).is_file():
        return False
    known = files.read_json(folder / DESCRIPTION)
    return {name: value for name, value in known.items() if name != "sha256"} == source


def tokens_of(found: Iterable[Page], tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[Numbers]:
    """The numbers of a stream for each page.

    Args:
        found: the pages.
        tokenizer: a fast one.
        end: the token at the end of a document.
    """
    for page in found:
        encoded = tokenizer(page.text, add_special_tokens=False, verbose=False)
        tokens = np.asarray(encoded["input_ids"], dtype="<u4")
        words = np.asarray([-1 if word is None else word for word in encoded.word_ids()])
        tokens[1:][(words[1:] == words[:-1]) & (words[1:] >= 0)] |= CONTINUES
        yield np.append(tokens, np.uint32(end)).astype("<u4") if page.ends else tokens


def _mapped(path: Path) -> Numbers:
    if not path.stat().st_size:
        return np.zeros(0, dtype="<u4")
    return np.memmap(path, dtype="<u4", mode="r")
