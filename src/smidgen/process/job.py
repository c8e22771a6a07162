"""One recipe with all that it needs to run: data, model, adapter and tokens; it plans, scores, answers and predicts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from smidgen.adapter import Adapter
from smidgen.errors import UserError
from smidgen.process import predict as prediction
from smidgen.process.data import Example, TaskData, load_data, read_examples, shared_texts
from smidgen.process.encoding import Encoded, encode, pad_id
from smidgen.process.evaluate import Answer, evaluate, generate, longest_answer
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.memory import told_when_it_runs_out
from smidgen.process.models import kind
from smidgen.process.optimizer import Rates, rates_of
from smidgen.process.plan import Plan, make_plan
from smidgen.process.probe import SHARED, Probe, probe_rows, shared_rows
from smidgen.process.recipe import Recipe
from smidgen.process.room import Room
from smidgen.process.scores import Scores, exact_match, rouge
from smidgen.process.spans import spans_of
from smidgen.process.splits import normalize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass
class Job:
    """Everything that a recipe needs to run.

    Attributes:
        recipe: what to do.
        labels: the classes, or the spans' labels; none in generation.
        model: with the adapter on it.
        tokenizer: the model's.
        adapter: what the recipe's technique trains.
        trained_on: of a finished run, the fingerprint of its data.
        frozen: what a run that trains it keeps of the rows from one epoch to the next.
        rounding: how far weights in 8 bits put the model's states off, over their size.
    """

    recipe: Recipe
    labels: tuple[str, ...]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    trained_on: str | None = None
    frozen: FrozenStates | None = None
    rounding: float | None = None

    @functools.cached_property
    def data(self) -> TaskData:
        """The rows of all splits."""
        return load_data(self.recipe.data, self.recipe.task)

    @property
    def fingerprint(self) -> str:
        """Of all rows and texts that decide about a run as it goes on."""
        return f"{self.data.fingerprint()} {self.recipe.text_hash() or ''}".strip()

    @functools.cached_property
    def _encoded(self) -> dict[str, tuple[list[Encoded], int]]:
        return {split: self.encode(getattr(self.data, split)) for split in ("train", "validation", "test")}

    @property
    def splits(self) -> dict[str, list[Encoded]]:
        """The tokens of each split."""
        return {split: rows for split, (rows, _) in self._encoded.items()}

    @property
    def notes(self) -> list[str]:
        """What a user should know about the data, in sentences."""
        shortened = [
            note for split, (rows, cut) in self._encoded.items() for note in self._row_notes(rows, cut, f"data.{split}")
        ]
        start = [f"Training goes on from the adapter in {self.recipe.start}."] if self.recipe.start else []
        rounding = f"8-bit weights put the model's last states off by {100 * (self.rounding or 0):.2g} % of their size."
        rounded = [rounding] if self.rounding is not None else []
        kept = [self.frozen.note] if self.frozen is not None and self.frozen.note else []
        return [*start, *self.data.notes, *shortened, *self._probe_notes(), *rounded, *kept]

    def _probe_notes(self) -> Iterator[str]:
        rows = self.splits["train"]
        if self.probe is not None and (shared := shared_rows(self.probe.rows, rows)):
            yield (
                f"{shared} of {len(rows)} rows of data.train share {SHARED} tokens in a row, and more, with "
                "probe.text: what they teach is not forgotten."
            )

    def _row_notes(self, rows: Sequence[Encoded], cut: int, source: str) -> Iterator[str]:
        """What became of the rows of a source as they were encoded, in sentences."""
        if cut:
            yield f"{cut} of {len(rows)} texts of {source} are longer than {self.room.row} tokens; their ends are cut."
        spans = sum(len(row.spans) for row in rows)
        if rows and not spans and self.recipe.task == "token-classification":
            yield f"No row of {source} has a span, so that its F1 is 0 whatever is found."
        missed = sum(
            len(set(row.spans) - set(spans_of(row.labels, row.offsets, self.labels)))
            for row in rows
            if not isinstance(row.labels, int) and row.spans
        )
        if missed:
            yield (
                f"{missed} of {spans} spans of {source} were cut off, or begin or end inside a token, so that they "
                "can't be found: they count as missed."
            )

    @functools.cached_property
    def room(self) -> Room:
        """How many tokens a row may have."""
        return Room(self.model, self.tokenizer, self.adapter, self.recipe.data.max_length)

    def answer(self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> tuple[list[Answer], int]:
        """The greedy answers to texts, and how many of the texts were cut."""
        prompts, cut = self.encode([Example(text) for text in texts], max_length=self.room.prompt(max_new_tokens))
        answers = generate(
            self.model,
            self.tokenizer,
            prompts,
            pad_id=pad_id(self.tokenizer),
            max_new_tokens=self.room.answer(max_new_tokens),
            batch_size=batch_size,
            precision=self.recipe.training.precision,
        )
        return answers, cut

    def encode(self, examples: Sequence[Example], *, max_length: int | None = None) -> tuple[list[Encoded], int]:
        """The tokens of examples, and how many were cut."""
        return encode(
            examples,
            self.recipe.task,
            self.tokenizer,
            max_length=max_length or self.room.row,
            template=self.recipe.data.template,
            labels=self.labels,
        )

    @property
    def rates(self) -> Rates:
        """Learning rates of the techniques and of the head: the entry's, the recipe's or the technique's own."""
        return rates_of(self.recipe, self.adapter, kind(self.model))

    @property
    def summary(self) -> str:
        """The technique's options and rates on one line."""
        options = "; ".join(filter(None, (method.summary() for method in self.adapter.methods)))
        rates, head = self.rates
        words = f"learning rate {' and '.join(f'{rate:g}' for rate in dict.fromkeys(rates))}"
        words += f", head {head:g}" if {head} != set(rates) else ""
        return ", ".join(filter(None, (options, words)))

    def plan(self) -> Plan:
        """What would be trained, and what it would cost."""
        with told_when_it_runs_out():
            pad = pad_id(self.tokenizer)
            return make_plan(self.model, self.adapter, self.splits["train"], self.recipe.training, pad, self.score)

    def score(self, rows: Sequence[Encoded]) -> Scores:
        """The scores of encoded rows."""
        return evaluate(
            self.model,
            rows,
            labels=self.labels,
            pad_id=pad_id(self.tokenizer),
            batch_size=self.recipe.training.rows_at_once,
            most_tokens=self.recipe.training.micro_batch_tokens,
            precision=self.recipe.training.precision,
            frozen=self.frozen,
        )

    @functools.cached_property
    def probe(self) -> Probe | None:
        """What the model should not forget, if the recipe says so.

        Raises:
            UserError: its text cannot be read.
        """
        config = self.recipe.probe
        if config is None:
            return None
        rows = probe_rows(config, self.tokenizer)
        return Probe(rows, config.rise, lambda rows: float(self.score(rows)["loss"]))

    def evaluate(self, source: str | None = None, *, tell: Callable[[str], object] = lambda note: None) -> Scores:
        """Score the adapter on the test split, or on another labelled source.

        Args:
            source: as in a recipe; None: the test split.
            tell: called with what a user should know about the rows, in sentences.

        Raises:
            UserError: the source cannot be read, or has labels that the adapter does not know; or the run's own data
                have changed, so that its test split may now hold rows that it was trained on.
        """
        notes: tuple[str, ...] = ()
        if source is None and self.trained_on not in (None, self.data.fingerprint()):
            raise UserError(
                "The data have changed since the adapter was trained, so that the test split may hold rows that it was "
                "trained on. Give labelled rows that it has not seen: --data FILE."
            )
        if source is None:
            examples = self.data.test
        else:
            examples, notes = read_examples(source, self.recipe.data, self.recipe.task, self.labels)
            notes += self._known(examples, source)
        rows, cut = self.encode(examples)
        for note in (*notes, *self._row_notes(rows, cut, source or "data.test")):
            tell(note)
        scores = self.score(rows)
        if self.recipe.task == "generation":
            texts, answers = [example.text for example in examples], [example.answer or "" for example in examples]
            longest = longest_answer(self.tokenizer, answers)
            found, shortened = self.answer(texts, max_new_tokens=longest, batch_size=self.recipe.training.rows_at_once)
            if shortened > cut:
                tell(
                    f"{shortened} of {len(texts)} prompts were cut to {self.room.prompt(longest)} tokens, so that an "
                    "answer fits behind them."
                )
            if (most := self.room.answer(longest)) < longest:
                tell(
                    f"Answers are written up to {most} tokens, a quarter of what the model takes, and the longest "
                    f"expected one needs up to {longest}: exact match and ROUGE are of what was written."
                )
            given = [answer.text for answer in found]
            scores |= {"exact_match": exact_match(given, answers), **rouge(given, answers)}
        return scores

    def _known(self, examples: Sequence[Example], source: str) -> tuple[str, ...]:
        """What a user should know about rows of another source whose texts were trained on."""
        try:
            if self.trained_on in (None, self.data.fingerprint()):
                texts, known = ([normalize(row.text) for row in rows] for rows in (examples, self.data.train))
                return tuple(shared_texts(texts, known, source, "data.train"))
            why = "the run's own data have changed"
        except UserError as error:
            why = str(error).rstrip(".")
        return (f"Whether {source} has rows that were trained on is not known: {why}.",)

    def predict(
        self,
        source: str,
        *,
        batch_size: int,
        max_new_tokens: int = prediction.MAX_NEW_TOKENS,
        tell: Callable[[str], object] = lambda note: None,
    ) -> Iterator[dict[str, Any]]:
        """Answer the texts of a file, or the lines of standard input for "-"; `tell` hears what was cut."""
        texts = prediction.texts(source, self.recipe.data.text)
        return prediction.predict(self, texts, batch_size=batch_size, max_new_tokens=max_new_tokens, tell=tell)
