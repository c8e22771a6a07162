"""Texts that look wrong: read in the wrong encoding, with the marks of a web page, or in another language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

MARKUP = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[0-9a-fA-F]{2,5});|</?[a-zA-Z][^<>]{0,80}>")
OTHER_ALPHABET = re.compile(r"[^\x00-\x7f]+")

LETTERS = 25
"""How many letters a text must have for its language to be told."""

EVIDENCE = 12.0
"""How much likelier, as a logarithm, another language must be than that of the other texts."""


def damage(text: str) -> str | None:
    """What is wrong with a text's characters, in a few words; None: nothing that shows."""
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "a character that was lost in reading (\N{REPLACEMENT CHARACTER})"
    if broken := next((run for run in OTHER_ALPHABET.findall(text) if _misread(run)), None):
        return f"UTF-8 that was read as Western European ({broken})"
    if any(unicodedata.category(letter) == "Cc" and letter not in "\t\n\r" for letter in text):
        return "control characters"
    if found := MARKUP.search(text):
        return f"marks of a web page ({found.group()})"
    if not any(letter.isalnum() for letter in text):
        return "no letter and no digit"
    return None


def _misread(run: str) -> bool:
    """Whether letters beyond ASCII are the bytes of fewer letters: é, as UTF-8 and read as Windows-1252, is Ã©."""
    try:
        return len(run.encode("cp1252").decode("utf-8")) < len(run)
    except UnicodeError:
        return False


def foreign(texts: Sequence[str]) -> tuple[str | None, dict[int, str]]:
    """The language of most texts, and those that are clearly in another one, by their numbers.

    Args:
        texts: any; short ones are passed over.

    Returns:
        ISO 639 codes; None and nothing if no text is long enough, or no language has two thirds of them.
    """
    import py3langid

    best = {
        number: str(py3langid.classify(text)[0])
        for number, text in enumerate(texts)
        if sum(map(str.isalpha, text)) >= LETTERS
    }
    (main, count), *_ = Counter(best.values()).most_common(1) or [("", 0)]
    if 3 * count < 2 * len(best) or not best:
        return None, {}

    def evidence(number: int) -> float:
        """How much likelier the text's own language is than that of most."""
        scores = dict(py3langid.rank(texts[number]))
        return float(scores[best[number]] - scores[main])

    return main, {n: language for n, language in best.items() if language != main and evidence(n) > EVIDENCE}
