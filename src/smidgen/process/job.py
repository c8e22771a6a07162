"""One recipe made ready to run: data, model, adapter and tokens; and a finished run opened again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import files, manifest
from smidgen.adapter import Adapter
from smidgen.attaching import attach, load
from smidgen.errors import UserError
from smidgen.modes import looking
from smidgen.process import checkpoint
from smidgen.process import predict as prediction
from smidgen.process.batches import collate
from smidgen.process.data import Example, TaskData, load_data, read_examples
from smidgen.process.encoding import Encoded, encode, pad_id
from smidgen.process.evaluate import evaluate, generate, longest_answer
from smidgen.process.frozen_states import FrozenStates
from smidgen.process.memory import told_when_it_runs_out
from smidgen.process.models import class_names, kind, load_model, longest_text
from smidgen.process.optimizer import Rates, rates_of
from smidgen.process.parallel import this_process
from smidgen.process.plan import Plan, make_plan
from smidgen.process.probe import SHARED, Probe, probe_rows, shared_rows
from smidgen.process.recipe import Recipe, load_recipe
from smidgen.process.room import Room
from smidgen.process.run_recipe import Precision
from smidgen.process.scores import Scores, exact_match, rouge
from smidgen.process.spans import labels_of, spans_of
from smidgen.process.technique import TechniqueSpec
from smidgen.tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIED = 8
"""Training rows on which the error of weights in 8 bits is measured."""


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

    def answer(self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> tuple[list[str], int]:
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
        rows, cut = self.encode(examples)
        for note in (*notes, *self._row_notes(rows, cut, source or "data.test")):
            tell(note)
        scores = self.score(rows)
        if self.recipe.task == "generation":
            texts, answers = [example.text for example in examples], [example.answer or "" for example in examples]
            longest = longest_answer(self.tokenizer, answers)
            given, _ = self.answer(texts, max_new_tokens=longest, batch_size=self.recipe.training.rows_at_once)
            scores |= {"exact_match": exact_match(given, answers), **rouge(given, answers)}
        return scores

    def predict(
        self, source: str, *, batch_size: int, tell: Callable[[str], object] = lambda note: None
    ) -> Iterator[dict[str, Any]]:
        """Answer the texts of a file, or the lines of standard input for "-"; `tell` hears if texts were cut."""
        texts = prediction.texts(source, self.recipe.data.text)
        return prediction.predict(self, texts, batch_size=batch_size, tell=tell)


def prepare(recipe: Recipe, *, device: torch.device | None = None) -> Job:
    """Load what a recipe names and attach its technique; nothing is written.

    Args:
        recipe: what to load.
        device: where the model goes; None: this process's accelerator, or the CPU.

    Raises:
        UserError: the data, the model or the technique cannot be used, or they do not go together.
    """
    data = load_data(recipe.data, recipe.task)
    training = recipe.training
    states: list[Tensor] = []

    def look(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        states.append(_last_states(model, tokenizer, recipe, data))

    model, tokenizer = load_model(
        recipe.model, recipe.task, data.labels, seed=training.seed, precision=training.precision, before=look
    )
    if states:
        look(model, tokenizer)
    error = float((states[1] - states[0]).norm() / states[0].norm()) if states else None
    model.to(device or this_process().device)  # type: ignore[arg-type]
    torch.manual_seed(training.seed)
    adapter = (
        attach_technique(recipe.technique, model, tokenizer)
        if recipe.start is None
        else start_from(recipe, model, data.labels)
    )
    if training.precision == "bf16":
        train_in_fp32(adapter)
    job = Job(recipe, data.labels, model, tokenizer, adapter, rounding=error)
    job.data = data
    return job


def _last_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: TaskData) -> Tensor:
    """The model's last states of the first training rows' texts, without dropout."""
    texts = [example.text for example in data.train[:TRIED]]
    most = recipe.data.max_length or longest_text(model, tokenizer)
    rows = [Encoded(ids, 0) for ids in tokenizer(texts, truncation=True, max_length=most)["input_ids"]]
    inputs = collate(rows, pad_id(tokenizer))
    with looking(model):
        states: Tensor = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    return states


def train_in_fp32(adapter: Adapter) -> None:
    """Keep what is trained in fp32: small steps are lost in bfloat16. The frozen weights take none."""
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()


def attach_technique(spec: TechniqueSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Adapter:
    """Put a recipe's technique on a model.

    Raises:
        UserError: the two do not go together.
    """
    try:
        return attach(model, spec.methods(), name=spec.slug, tokenizer=tokenizer)
    except ValueError as error:
        raise UserError(f"technique={spec.name}: {error}") from error


def start_from(recipe: Recipe, model: PreTrainedModel, labels: tuple[str, ...]) -> Adapter:
    """Put the trained adapter that a recipe starts from on a model; a head for other labels is left behind.

    Raises:
        UserError: there is none, it is for another model, or it is of another technique or other options.
    """
    path = recipe.starting_folder
    if path is None or not (path / manifest.FILE).is_file():
        raise UserError(f"start={recipe.start!r} holds no adapter. Give the output folder of a finished run.")
    same_head = list(class_names(recipe.task, labels)) == (manifest.read(path).labels or [])
    adapter = load(model, path, name=recipe.technique.slug, head=same_head, dtype=torch.float32)
    names = "+".join(method.name for method in adapter.methods)
    if names != recipe.technique.name:
        raise UserError(f"start={recipe.start!r} holds {names}, and the recipe trains {recipe.technique.name}.")
    for part, method in zip(recipe.technique.parts, adapter.methods, strict=True):
        for option, value in part.options.items():
            if getattr(method, option) != value:
                raise UserError(
                    f"start={recipe.start!r} holds {method.title} with {option}={getattr(method, option)!r}, and "
                    f"technique gives {option}={value!r}: training goes on with what is there, so leave it out."
                )
    return adapter


def _put_head(adapter: Adapter, path: Path) -> None:
    """Give an adapter the head of a saved one."""
    saved, own = read_tensors(path / manifest.TENSORS), dict(adapter.named_parameters())
    with torch.no_grad():
        for name in manifest.read(path).head:
            own[name].copy_(saved[name])


def reopen(folder: Path, *, precision: Precision | None = None, body: Path | None = None) -> Job:
    """Open the output folder of a finished run, its adapter loaded.

    Args:
        folder: where it is.
        precision: number format of the frozen weights; None: the one that it was trained with.
        body: another run's folder, whose adapter is put under this run's head.

    Raises:
        UserError: it is not one.
    """
    if (folder / "model").is_dir() and not (folder / "adapter").is_dir():
        raise UserError(
            f"{folder} holds a model and no adapter, as `smidgen pretrain` writes it. Fine-tune it first, by a recipe "
            f"with model: {folder / 'model'}"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the output of `smidgen train`: it has no recipe.yaml.")
    if not (folder / "metrics.json").is_file():  # an adapter there is of another run than the recipe
        raise UserError(
            f"The run in {folder} has not finished. Train it to its end: smidgen train {folder / 'recipe.yaml'}"
            + (" --resume" if checkpoint.exists(folder / "checkpoint") else "")
        )
    recipe = load_recipe(folder / "recipe.yaml", [f"training.precision={precision}"] if precision else [])
    saved = manifest.read(folder / "adapter").labels or ()
    labels = labels_of(saved) if recipe.task == "token-classification" else tuple(saved)
    model, tokenizer = load_model(
        recipe.model, recipe.task, labels, seed=recipe.training.seed, precision=recipe.training.precision
    )
    model.to(this_process().device)
    adapter = load(model, (body or folder) / "adapter", head=body is None, dtype=torch.float32)  # as it was trained
    if body is not None:
        _put_head(adapter, folder / "adapter")
    model.eval()
    trained_on = files.read_json(folder / "metrics.json").get("data")
    return Job(recipe, labels, model, tokenizer, adapter, trained_on)
