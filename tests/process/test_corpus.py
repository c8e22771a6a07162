"""A corpus becomes its tokens, every page in one stream, whatever the files; what is no text is named."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from smidgen.errors import UserError
from smidgen.process import corpus
from smidgen.process.corpus import CONTINUES, pages, text_files, write_streams
from tests.process.test_encoding import BYTE, WORD, WORDS

END = 1_000_000


def written(folder: Path, texts: dict[str, str]) -> list[Path]:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def test_files_folders_and_patterns_are_a_corpus(tmp_path: Path) -> None:
    a, b, c, _ = written(tmp_path, {"a.txt": "a", "deep/b.txt": "b", "c.text": "c", "d.bin": "d"})
    assert text_files([str(tmp_path)]) == [a, b]
    assert text_files([str(tmp_path / "*.t*xt"), str(a)]) == [a, c]
    assert text_files([str(tmp_path / "**" / "*.txt")]) == [a, b]
    assert text_files([str(c)]) == [c]
    for nothing in ("none.txt", "*.md", "deep/deeper"):
        with pytest.raises(UserError, match="names no text file"):
            text_files([str(tmp_path / nothing)])


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_pages_hold_all_of_the_text_and_cut_no_word(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LARGEST_PAGE", size)
    monkeypatch.setattr(corpus, "PAGES", 10**9)
    texts = {"a.txt": f"{words(60)}\n\n{words(40, 1)}\n", "b.txt": " \n ", "c.txt": "", "d.txt": "x" * 3000 + " end"}
    paths = written(tmp_path, texts)
    found = list(corpus._pages_of(paths[0], size))
    assert "".join(page.text for page in found) == texts["a.txt"]
    assert [page.ends for page in found] == [False] * (len(found) - 1) + [True]
    for page in pages(paths):
        assert all(word in {*WORDS, "x" * 3000, "end"} for word in page.text.split())


@pytest.mark.parametrize("tokenizer", [WORD, BYTE], ids=["a token a word", "a token a byte"])
def test_streams_hold_every_token_and_which_go_on_with_a_word(tokenizer, tmp_path: Path) -> None:
    texts = {f"{number}.txt": words(700, number) for number in range(3)}
    paths = written(tmp_path / "texts", texts)
    streams = write_streams(tmp_path / "tokens", paths, None, tokenizer, end=END, share=0.2)
    both = np.concatenate([streams.train, streams.validation])
    tokens = [token for text in texts.values() for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = [token for token in (both & ~CONTINUES).tolist() if token != END]
    assert sorted(found) == sorted(tokens)
    ends = int(((streams.train & ~CONTINUES) == END).sum()), int(((streams.validation & ~CONTINUES) == END).sum())
    assert min(ends) > 3  # of the documents, and where one goes on in the other stream
    assert 0.15 < len(streams.validation) / len(both) < 0.25
    encoded = tokenizer(texts["0.txt"], add_special_tokens=False)
    ids = encoded.word_ids()
    wanted = sum(first == second for first, second in itertools.pairwise(ids))
    assert wanted * 2 < int(((both & CONTINUES) != 0).sum()) <= wanted * 4 or wanted == 0


def test_text_without_white_space_is_cut_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LONGEST_WORD", 100)
    (path,) = written(tmp_path, {"a.txt": "\u6c34" * 1000})
    found = list(corpus._pages_of(path, 30))
    assert "".join(page.text for page in found) == "\u6c34" * 1000
    assert max(len(page.text) for page in found) <= 130


def test_validation_files_take_no_page_of_the_others(tmp_path: Path) -> None:
    train, held = written(tmp_path, {"a.txt": words(500), "b.txt": words(50)})
    streams = write_streams(tmp_path / "tokens", [train], [held], WORD, end=END, share=0.2)
    assert (len(streams.train), len(streams.validation)) == (501, 51)


def test_streams_are_written_once_and_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written(tmp_path, {"a.txt": words(500)})

    def write(share: float = 0.2) -> str:
        return write_streams(tmp_path / "tokens", paths, None, WORD, end=END, share=share).fingerprint

    first = write()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "pages", lambda paths: pytest.fail("read again"))
        assert write() == first
    assert write(share=0.5) != first
    assert write() == first
    more = written(tmp_path, {"b.txt": words(500, seed=2), "c.txt": words(500, seed=3)})
    both = [
        write_streams(tmp_path / "tokens", [paths[0], *trained], held, WORD, end=END, share=0.2)
        for trained, held in (([more[0]], [more[1]]), ([], more))
    ]
    assert len(both[0].train) == 2 * len(both[1].train)
    paths[0].write_text(words(500, seed=1))
    os.utime(paths[0], ns=(0, 0))
    assert write() != first


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\x01\x02", "a.txt is no text: it holds a zero byte"),
        (b"\x89PNG\xff\xfe", "a.txt is not UTF-8 text: invalid start byte"),
        ("hé".encode("utf-16"), "a.txt is not UTF-8 text"),
    ],
    ids=["zeros", "an image", "UTF-16"],
)
def test_what_is_no_text_is_named_and_nothing_is_left(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        write_streams(tmp_path / "tokens", [path], None, WORD, end=END, share=0.1)
    assert list(tmp_path.iterdir()) == [path]


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LARGEST_PAGE", 500)
    peaks = []
    for number, size in enumerate((40_000, 400_000)):
        paths = written(tmp_path / str(number), {"a.txt": words(size)})
        tracemalloc.start()
        write_streams(tmp_path / str(number) / "tokens", paths, None, WORD, end=END, share=0.1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
