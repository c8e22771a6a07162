"""The tokens that the model sees of an example, and those that it learns from."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smidgen.errors import UserError
from smidgen.placeholders import IGNORED
from smidgen.process.problems import shown
from smidgen.process.recipe import Task
from smidgen.process.spans import Span, tags_of, trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smidgen.process.data import Example


TEXT = "{text}"
"""What stands for the text in a template."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one row.

    Attributes:
        input_ids: at least one.
        labels: the class; or what is expected of the model at each token: its tag, or, in generation, the token that
            comes next. IGNORED where nothing is.
        offsets: in token classification, which characters of the text each token stands for, without white space at
            their ends; (n, n): none.
        spans: in token classification, the true ones, whether or not tokens can tell them.
    """

    input_ids: list[int]
    labels: int | list[int]
    offsets: tuple[tuple[int, int], ...] = ()
    spans: tuple[Span, ...] = ()


def encode(
    examples: Sequence[Example],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    template: str = TEXT,
    labels: Sequence[str] = (),
) -> tuple[list[Encoded], int]:
    """Turns examples into tokens.

    Classification: the template with the text, and the tokens that the tokenizer puts around it.

    Token classification: the same; the text's tokens have the tags of its spans.

    Generation: the prompt (the template with the text, and the tokens that the tokenizer puts before it), the answer,
    and the end-of-text token. A space stands between prompt and answer, unless the template ends in a line break or a
    tab; it belongs to the answer's first token, as vocabularies have it, so spaces at the prompt's end are dropped.
    Prompt and answer are tokenized apart: a prompt has the same tokens whether its answer is known or not, the first
    label is the answer's first token exactly, and an example without an answer gives the prompt that `generate`
    continues.

    A row beyond `max_length` loses the end of its text, never a part of the template. A long answer takes the
    prompt's room down to half of `max_length`; what is still too long of it is cut off, and the end-of-text token
    with it, so that the model does not learn to stop there.

    Args:
        examples: the rows.
        task: what the labels are.
        tokenizer: the model's.
        max_length: the most tokens in a row, at least 1.
        template: how a text is written for the model; holds {text} once.
        labels: in token classification, the names of the spans' labels.

    Returns:
        One row for each example, in their order, and how many of them were cut.

    Raises:
        UserError: the template leaves no room for the text, a text has no token, or the tokenizer has no
            end-of-text token, or cannot tell where in the text a token is.
    """
    writer = _PromptWriter(tokenizer, template, continued=task == "generation")
    tokens = writer.located if task == "token-classification" else writer.tokens
    prompts = tokens([example.text for example in examples])
    answers = _answers(examples, tokenizer, writer.space) if task == "generation" else [[] for _ in examples]
    rows: list[Encoded] = []
    cut = 0
    for example, (prompt, offsets), answer in zip(examples, prompts, answers, strict=True):
        room = max(max_length - len(answer), (max_length + 1) // 2)
        fitting = prompt
        if len(prompt) > room:
            fitting, offsets = tokens([writer.fit(example.text, room)])[0]
        if not fitting:
            raise UserError(f"The text {shown(example.text)} has no token in the model's vocabulary. Leave it out.")
        kept = answer[: max_length - len(fitting)]
        cut += len(fitting) < len(prompt) or len(kept) < len(answer)
        if task == "generation":
            rows.append(Encoded(fitting + kept, [IGNORED] * (len(fitting) - 1) + kept + [IGNORED]))
        elif task == "token-classification":
            tags = [IGNORED] * len(fitting) if example.spans is None else tags_of(example.spans, offsets, labels)
            rows.append(Encoded(fitting, tags, offsets, example.spans or ()))
        else:
            rows.append(Encoded(fitting, IGNORED if example.label is None else example.label))
    return rows, cut


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; tokenizers of decoders often have none, and end of text serves as well under a mask."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


Located = tuple[list[int], tuple[tuple[int, int], ...]]
"""The tokens of a prompt, and which characters of its text each stands for."""


class _PromptWriter:
    """Writes texts into a template and turns them into tokens.

    Args:
        tokenizer: the model's.
        template: holds {text} once.
        continued: whether an answer follows, so that nothing may close the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, *, continued: bool) -> None:
        self.tokenizer = tokenizer
        self.continued = continued
        self.before, _, self.after = template.partition(TEXT)
        self.space = "" if self.after.rstrip(" ").endswith(("\n", "\t")) else " "
        closing = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.closed = continued and closing  # by an end-of-text token of the tokenizer's own

    def tokens(self, texts: Sequence[str]) -> list[Located]:
        """The tokens of whole prompts; where in the texts they are is not asked."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer([self._write(text) for text in texts], verbose=False)["input_ids"]
        return [(row[:-1] if self.closed else row, ()) for row in ids]

    def located(self, texts: Sequence[str]) -> list[Located]:
        """The tokens of whole prompts, and which characters of its text each stands for."""
        start = len(self.before)
        found = []
        for text, (ids, spans) in zip(texts, self._spans(texts), strict=True):
            end = start + len(text)
            inside = [(max(first, start) - start, min(last, end) - start) for first, last in spans]
            found.append((ids, tuple(_characters(text, first, last) for first, last in inside)))
        return found

    def fit(self, text: str, room: int) -> str:
        """As much of the text's start as leaves at most `room` tokens of its prompt."""
        start = len(self.before)
        while True:
            ((ids, spans),) = self._spans([text])
            excess = len(ids) - room
            if excess <= 0:
                return text
            inside = [first for first, last in spans if first < last and start <= first < start + len(text)]
            if excess >= len(inside):
                raise UserError(
                    f"The template {shown(self.before + TEXT + self.after)} takes {len(ids) - len(inside)} tokens and "
                    f"leaves no room for a text in {room}. Shorten it, or raise data.max_length."
                )
            text = text[: inside[-excess] - start]

    def _write(self, text: str) -> str:
        prompt = self.before + text + self.after
        return prompt.rstrip(" ") if self.continued else prompt

    def _spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The tokens of prompts, and which of their characters each stands for."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} can't tell where in the text {shown(texts[0])} a token is, so "
                "that it can neither be cut nor have spans. Use a model with a fast tokenizer (tokenizer.json)."
            )
        written = [self._write(text) for text in texts]
        found = self.tokenizer(written, return_offsets_mapping=True, verbose=False)
        whole = slice(None, -1 if self.closed else None)
        return [
            (ids[whole], places[whole]) for ids, places in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]


def _characters(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's part of a text: without white space, and with the accents after it that its tokenizer drops."""
    if start >= end:
        return 0, 0
    start, end = trimmed(text, start, end)
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


def _answers(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, space: str) -> list[list[int]]:
    """The tokens of each answer and the end of text; none where the answer is not known."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(f"{type(tokenizer).__name__} has no end-of-text token, so that an answer could not end.")
    known = [f"{space}{example.answer}" for example in examples if example.answer is not None]
    ids = iter(tokenizer(known, add_special_tokens=False, verbose=False)["input_ids"] if known else [])
    return [[] if example.answer is None else [*next(ids), end] for example in examples]
