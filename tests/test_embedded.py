"""What is embedded is fetched once, by hash, without running anything of it; and it is what the documentation says."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smidgen import embedded
from smidgen.download import Archive
from smidgen.embedded import EMBEDDED, Source
from smidgen.errors import UserError

METADATA = "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"


def wheel() -> tuple[str, bytes]:
    """A package whose only content is toy_data/words.txt."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("toy_data/words.txt", "words")
        archive.writestr("toy_data-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_data-1.0.dist-info/RECORD", "")
    return "toy_data-1.0-py3-none-any.whl", file.getvalue()


def sdist(setup: str) -> tuple[str, bytes]:
    """The same as a source archive, with that setup.py."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": METADATA, "words.txt": "words"}.items():
            member = tarfile.TarInfo(f"toy-data-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return "toy-data-1.0.tar.gz", file.getvalue()


def unpack_toy(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder / "words.txt").write_bytes(archive.read("toy_data/words.txt"))


Offer = Callable[..., Path]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Embed a package as "toy", from an index that is a folder; returns the folder."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def offer(
        file: tuple[str, bytes] | None = None,
        *,
        unpack: Callable[[Path, Path], None] = unpack_toy,
        hash_of: bytes | None = None,
    ) -> Path:
        index = tmp_path / "index"
        index.mkdir()
        name, content = file or wheel()
        (index / name).write_bytes(content)
        archive = Archive(
            package="toy-data",
            version="1.0",
            sha256=hashlib.sha256(hash_of or content).hexdigest(),
            megabytes=0.1,
            kind="source" if name.endswith(".tar.gz") else "wheel",
        )
        toy = Source(kind="data", title="toy", origin="here", licence="MIT", archive=archive, unpack=unpack)
        monkeypatch.setitem(EMBEDDED, "toy", toy)
        return index

    return offer


def test_a_package_is_fetched_once(offer: Offer) -> None:
    index = offer()
    assert not embedded.available("toy")
    folder = embedded.fetch("toy")
    assert (folder / "words.txt").read_text() == "words"
    shutil.rmtree(index)
    assert embedded.available("toy")
    assert embedded.fetch("toy") == folder


def test_nothing_of_a_source_archive_is_run(offer: Offer, tmp_path: Path) -> None:
    def unpack(path: Path, folder: Path) -> None:
        with tarfile.open(path) as archive:
            words = archive.extractfile("toy-data-1.0/words.txt")
            assert words is not None
            (folder / "words.txt").write_bytes(words.read())

    offer(sdist(f"open({str(tmp_path / 'was run')!r}, 'w')"), unpack=unpack)
    assert (embedded.fetch("toy") / "words.txt").read_text() == "words"
    assert not (tmp_path / "was run").exists()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of that text in npm's place, and a package of npm's under "toy"."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    content = sdist("")[1]
    (tmp_path / "toy.tgz").write_bytes(content)

    def unpack(path: Path, folder: Path) -> None:
        with tarfile.open(path) as archive:
            (folder / "words.txt").write_text(" ".join(archive.getnames()))

    archive = Archive(
        package="@toy/data", version="1.0", sha256=hashlib.sha256(content).hexdigest(), megabytes=0.1, kind="npm"
    )
    toy = Source(kind="corpus", title="toy", origin="here", licence="MIT", archive=archive, unpack=unpack)
    monkeypatch.setitem(EMBEDDED, "toy", toy)

    def install(text: str) -> None:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "npm").chmod(0o755)

    return install


def test_npm_fetches_what_it_has(npm: Callable[[str], None], tmp_path: Path) -> None:
    npm(f'echo "$@" > {tmp_path}/said; cp {tmp_path}/toy.tgz archive/')
    assert "words.txt" in (embedded.corpus_folder("toy") / "words.txt").read_text()
    assert (tmp_path / "said").read_text().split() == [
        *("pack", "--loglevel=error", "--ignore-scripts", "--pack-destination=archive", "@toy/data@1.0")
    ]


def test_what_npm_could_not_fetch_is_said(npm: Callable[[str], None], tmp_path: Path) -> None:
    npm("echo no network >&2; exit 1")
    with pytest.raises(UserError, match=r"npm could not download @toy/data@1\.0 \(0\.1 MB\):\nno network\n"):
        embedded.fetch("toy")
    npm(f"head -c 100 {tmp_path}/toy.tgz > archive/toy.tgz")
    with pytest.raises(UserError, match="is not the file that was tested"):
        embedded.fetch("toy")


def test_a_file_with_another_hash_is_refused_and_nothing_is_kept(offer: Offer, tmp_path: Path) -> None:
    offer(hash_of=b"another file")
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        embedded.fetch("toy")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["toy-1.0.lock"]


def test_without_a_network_the_error_says_what_was_tried_and_what_would_do(offer: Offer) -> None:
    shutil.rmtree(offer())
    with pytest.raises(UserError) as raised:
        embedded.fetch("toy")
    message = str(raised.value)
    assert message.startswith("pip could not download toy-data==1.0 (0.1 MB):\nERROR: Could not find a version")
    assert "set PIP_FIND_LINKS here" in message
    assert message.endswith("python -m pip download --no-deps toy-data==1.0")


def test_without_pip_the_error_says_how_to_get_it(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    offer()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"toy-data==1\.0 is fetched with pip.*-m ensurepip"):
        embedded.fetch("toy")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("wor")], ids=["missing", "cut short"])
def test_a_file_that_is_missing_or_cut_short_is_fetched_again(offer: Offer, damage: Callable[[Path], object]) -> None:
    offer()
    folder = embedded.fetch("toy")
    damage(folder / "words.txt")
    assert not embedded.available("toy")
    assert (embedded.fetch("toy") / "words.txt").read_text() == "words"


def test_an_unpacking_that_fails_leaves_nothing_that_looks_whole(offer: Offer, tmp_path: Path) -> None:
    def unpack(path: Path, folder: Path) -> None:
        (folder / "words.txt").write_text("half of the wor")
        raise KeyboardInterrupt

    offer(unpack=unpack)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch("toy")
    assert not embedded.available("toy")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["toy-1.0.lock"]


def test_what_a_killed_process_left_is_removed(offer: Offer, tmp_path: Path) -> None:
    offer()
    left = tmp_path / "cache" / ".toy-1.0.killed"
    left.mkdir(parents=True)
    embedded.fetch("toy")
    assert not left.exists()


def test_whoever_asks_at_the_same_time_waits_for_one_download(offer: Offer) -> None:
    unpacked = []

    def unpack(path: Path, folder: Path) -> None:
        unpacked.append(path)
        unpack_toy(path, folder)

    offer(unpack=unpack)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(embedded.fetch, ["toy"] * 4))
    assert len(folders) == len(unpacked) == 1


def test_a_cache_that_cannot_be_written_is_named(offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"embedded:toy cannot be kept in .*below.*Set SMIDGEN_CACHE to another folder"):
        embedded.fetch("toy")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no embedded model, data or corpus 'tweet'. Did you mean 'tweets'\?"):
        embedded.fetch("tweet")
    with pytest.raises(UserError, match=r"no embedded model 'tweets'. There are: minilm, smollm2\."):
        embedded.model_folder("tweets")


def test_the_command_lists_every_origin_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedded.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{source.origin}; {source.licence}" in listed for source in EMBEDDED.values())


def test_the_command_fetches_the_rest_when_one_cannot_be_had(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer()
    assert embedded.main(["fetch", "tweet", "toy"]) == 1
    assert "Did you mean 'tweets'" in capsys.readouterr().err
    assert embedded.available("toy")
    assert embedded.main(["fetch", "toy"]) == 0


def needs(name: str) -> pytest.MarkDecorator:
    missing = f"embedded:{name} is not in the cache; with a network: python -m smidgen.embedded fetch {name}"
    return pytest.mark.skipif(not embedded.available(name), reason=missing)


@needs("tweets")
def test_of_4200_rated_tweets_3432_are_clear_and_68_percent_of_them_positive() -> None:
    assert len((embedded.fetch("tweets") / "tweets.tsv").read_bytes().split(b"\r\n")) == 4200
    tweets = embedded.tweets()
    assert len(tweets) == len(dict(tweets)) == 3432
    assert sum(label == "positive" for _, label in tweets) == 2345
    assert {label for _, label in tweets} == {"negative", "positive"}
    assert tweets[1] == ("Yay. Another good phone interview.", "positive")
    assert any("español" in text for text, _ in tweets)


@needs("tweets")
def test_the_tweets_can_be_learned() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    texts, labels = zip(*embedded.tweets(), strict=True)
    words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0))
    assert 0.82 < cross_val_score(words, texts, labels, cv=5).mean() < 0.88


@needs("questions")
def test_898_pairs_ask_749_questions() -> None:
    pairs = embedded.questions()
    assert len(pairs) == len(set(pairs)) == 898
    assert len({question for question, _ in pairs}) == 749
    assert all(question and answer for question, answer in pairs)
    assert ("What is the name of Jordan’s capital city?", "Amman") in pairs


@needs("minilm")
def test_minilm_puts_sentences_of_one_meaning_together() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = embedded.model_folder("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    batch = tokenizer(["I lost my card.", "My card is gone.", "It will rain today."], padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    same, other = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert same > 0.7 > 0.3 > other


@needs("smollm2")
def test_smollm2_answers_and_its_tokenizer_gives_text_back() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.model_folder("smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192

    text = "In 2024, I'd paid $1,234.56:\n\n42 naïve 日本 \t  7 x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("total:\n\n42  7") == ["total", ":", "ĊĊ", "4", "2", "ĠĠ", "7"]

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
