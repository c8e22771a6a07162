"""One recipe made ready to run: data, model, adapter and tokens; and a finished run opened again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import files, manifest
from smidgen.adapter import Adapter, attach, load
from smidgen.delta import own_parameters
from smidgen.errors import Interrupted, UserError
from smidgen.process import checkpoint
from smidgen.process import predict as prediction
from smidgen.process.data import Example, TaskData, load_data, read_examples
from smidgen.process.encoding import Encoded, encode, pad_id
from smidgen.process.evaluate import Scores, evaluate, exact_match, generate, longest_answer
from smidgen.process.memory import peak_memory
from smidgen.process.models import kind, load_model, longest_text
from smidgen.process.parallel import get_weights, is_sharded, this_process
from smidgen.process.plan import Plan, make_plan
from smidgen.process.recipe import Recipe, load_recipe, refuse_own
from smidgen.process.train import Progress, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass
class Job:
    """Everything that a recipe needs to run.

    Attributes:
        recipe: what to do.
        labels: the classes; none in generation.
        model: with the adapter on it.
        tokenizer: the model's.
        adapter: what the recipe's technique trains.
    """

    recipe: Recipe
    labels: tuple[str, ...]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter

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
            note
            for split, (rows, cut) in self._encoded.items()
            for note in _cut_note(cut, len(rows), f"data.{split}", self.max_length)
        ]
        return [*self.data.notes, *shortened]

    @property
    def _positions(self) -> int:
        """The most tokens that the model takes beside the virtual ones.

        Raises:
            UserError: the virtual ones leave it none.
        """
        whole, virtual = longest_text(self.model, self.tokenizer), self.adapter.virtual_tokens
        if virtual >= whole:
            longest = max(self.adapter.methods, key=lambda method: method.virtual_tokens)
            raise UserError(
                f"technique={self.recipe.technique.name}: {longest.name}'s length={longest.virtual_tokens} leaves no "
                f"room for a text, as the model takes {whole} tokens. Lower it."
            )
        return whole - virtual

    @property
    def max_length(self) -> int:
        """The most tokens in a row: the recipe's, or the model's limit less the virtual tokens.

        Raises:
            UserError: the recipe asks for more than the model takes, or the virtual tokens leave no room.
        """
        limit = self._positions
        wanted = self.recipe.data.max_length
        if wanted is not None and wanted > limit:
            raise UserError(
                f"data.max_length={wanted} is more than the {limit} tokens that the model takes beside "
                f"{self.adapter.virtual_tokens} virtual ones. Lower it."
            )
        return wanted or limit

    def prompt_room(self, max_new_tokens: int) -> int:
        """The most tokens in a prompt, such that an answer fits behind it."""
        return min(self.max_length, self._positions - self._answer_room(max_new_tokens))

    def _answer_room(self, max_new_tokens: int) -> int:
        """The most tokens in an answer, whatever its prompt: a quarter of the model's at most."""
        return min(max_new_tokens, max(1, self._positions // 4))

    def answer(self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> tuple[list[str], int]:
        """The greedy answers to texts, and how many of the texts were cut."""
        room = self.prompt_room(max_new_tokens)
        prompts, cut = self.encode([Example(text) for text in texts], max_length=room)
        answers = generate(
            self.model,
            self.tokenizer,
            prompts,
            pad_id=pad_id(self.tokenizer),
            max_new_tokens=self._answer_room(max_new_tokens),
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
            max_length=max_length or self.max_length,
            template=self.recipe.data.template,
        )

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the adapter and of the head: the technique's entry, the recipe's, the technique's own."""
        spec, training, method = self.recipe.technique, self.recipe.training, self.adapter.methods[0]
        rate = spec.learning_rate or training.learning_rate or method.learning_rates[kind(self.model)]
        given = spec.learning_rate or training.learning_rate
        head = spec.head_learning_rate or training.head_learning_rate or given or method.head_learning_rate or rate
        return rate, head

    @property
    def summary(self) -> str:
        """The technique's options and rates on one line."""
        options = "; ".join(filter(None, (method.summary() for method in self.adapter.methods)))
        rate, head = self.rates
        words = f"learning rate {rate:g}" + (f", head {head:g}" if head != rate else "")
        return ", ".join(filter(None, (options, words)))

    def plan(self) -> Plan:
        """What would be trained, and what it would cost."""
        with _told_when_out_of_memory():
            pad = pad_id(self.tokenizer)
            return make_plan(self.model, self.adapter, self.splits["train"], self.recipe.training, pad)

    def train(self, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
        """Train, keep the best epoch, score it on the test split, and write adapter/ and metrics.json.

        Raises:
            UserError: an unfinished run is in the way, the memory does not suffice, or the loss is not finite.
            Interrupted: Ctrl-C; a checkpoint was saved.
        """
        folder, is_main = Path(self.recipe.output), this_process().is_main_process
        stopped = folder / "checkpoint"
        if checkpoint.exists(stopped) and not resume:
            raise UserError(
                f"{folder} holds an unfinished run. Add --resume to go on with it, remove {stopped} to start again, or "
                "give another output."
            )
        resume = resume and (checkpoint.exists(stopped) or not stopped.is_dir())  # stopped in its first checkpoint
        refuse_own(folder / "recipe.yaml")
        if is_main and not resume:
            (folder / "metrics.json").unlink(missing_ok=True)
            self.recipe.save(folder / "recipe.yaml")
        with _told_when_out_of_memory():
            progress = train(
                self.model,
                self.adapter,
                self.splits["train"],
                lambda: self._score(self.splits["validation"]),
                recipe=self.recipe,
                rates=self.rates,
                pad_id=pad_id(self.tokenizer),
                data=self.data.fingerprint(),
                resume=resume,
                quiet=quiet,
            )
            peak = peak_memory(self.model.device)
            try:
                scores = self.evaluate()
            except KeyboardInterrupt:
                raise Interrupted(
                    "Stopped after training, while the test split was scored; a checkpoint is in "
                    f"{stopped}. Go on with: smidgen train {folder / 'recipe.yaml'} --resume"
                ) from None
        kept = {name: value for name, value in scores.items() if isinstance(value, float)}
        weights = get_weights(self.adapter)
        if is_main:
            self._whole(weights).adapter.save(folder / "adapter", metrics=kept, labels=self.labels or None)
        this_process().wait_for_everyone()
        metrics = self._metrics(progress, scores, peak)
        metrics["disk_bytes"] = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
        if is_main:
            files.write_json(folder / "metrics.json", metrics)
            shutil.rmtree(stopped, ignore_errors=True)
        this_process().wait_for_everyone()
        return metrics

    def _whole(self, weights: dict[str, Tensor]) -> Job:
        """This job with nothing sharded, so that one process alone can save it: loaded once more, on the CPU."""
        if not is_sharded(self.model):
            return self
        whole = prepare(self.recipe, device=torch.device("cpu"))
        whole.adapter.load_state(weights)
        return whole

    def _score(self, rows: Sequence[Encoded]) -> Scores:
        return evaluate(
            self.model,
            rows,
            labels=self.labels,
            pad_id=pad_id(self.tokenizer),
            batch_size=self._rows_at_once,
            precision=self.recipe.training.precision,
        )

    @property
    def _rows_at_once(self) -> int:
        """What evaluation may take of the memory: no more rows than training."""
        training = self.recipe.training
        return min(32, training.micro_batch_size or training.batch_size)

    def evaluate(self, source: str | None = None, *, tell: Callable[[str], object] = lambda note: None) -> Scores:
        """Score the adapter on the test split, or on another labelled source.

        Args:
            source: as in a recipe; None: the test split.
            tell: called with what a user should know about the rows, in sentences.

        Raises:
            UserError: the source cannot be read, or has labels that the adapter does not know.
        """
        notes: tuple[str, ...] = ()
        if source is None:
            examples = self.data.test
        else:
            examples, notes = read_examples(source, self.recipe.data, self.recipe.task, self.labels)
        rows, cut = self.encode(examples)
        for note in (*notes, *_cut_note(cut, len(rows), source or "data.test", self.max_length)):
            tell(note)
        scores = self._score(rows)
        if self.recipe.task == "generation":
            texts, answers = [example.text for example in examples], [example.answer or "" for example in examples]
            longest = longest_answer(self.tokenizer, answers)
            given, _ = self.answer(texts, max_new_tokens=longest, batch_size=self._rows_at_once)
            scores["exact_match"] = exact_match(given, answers)
        return scores

    def _metrics(self, progress: Progress, scores: Scores, peak: int) -> dict[str, Any]:
        return {
            "technique": self.recipe.technique.name,
            "summary": self.summary,
            "seed": self.recipe.training.seed,
            "recipe": self.recipe.fingerprint(),
            "data": self.data.fingerprint(),
            "notes": self.notes,
            "test": scores,
            "best_epoch": progress.best_epoch + 1,
            "curve": progress.curve,
            "trained": self.adapter.trainable,
            "total": self.adapter.total,
            "base_parameters": sum(parameter.numel() for _, parameter in own_parameters(self.model)),
            "seconds": progress.seconds,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "peak_memory_bytes": peak,
        }

    def predict(
        self, source: str, *, batch_size: int, tell: Callable[[str], object] = lambda note: None
    ) -> Iterator[dict[str, Any]]:
        """Answer the texts of a file, or the lines of standard input for "-"; `tell` hears if texts were cut."""
        texts = prediction.texts(source, self.recipe.data.text)
        return prediction.predict(self, texts, batch_size=batch_size, tell=tell)

    def merge(self, output: Path) -> None:
        """Write the model with the adapter merged into it, and its tokenizer.

        Raises:
            UserError: the technique cannot be merged, or the folder cannot be written.
        """
        try:
            self.adapter.merge()
        except ValueError as error:
            raise UserError(str(error)) from error
        with files.new_folder(output) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


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
    model, tokenizer = load_model(
        recipe.model, recipe.task, data.labels, seed=training.seed, precision=training.precision
    )
    model.to(device or this_process().device)  # type: ignore[arg-type]
    torch.manual_seed(training.seed)
    try:
        adapter = attach(model, recipe.technique.methods(), name=recipe.technique.slug, tokenizer=tokenizer)
    except ValueError as error:
        raise UserError(f"technique={recipe.technique.name}: {error}") from error
    if training.precision == "bf16":
        for parameter in adapter.parameters():  # small steps are lost in bfloat16; the frozen weights take none
            parameter.data = parameter.data.float()
    job = Job(recipe, data.labels, model, tokenizer, adapter)
    job.data = data
    return job


def reopen(folder: Path) -> Job:
    """Open the output folder of a finished run, its adapter loaded.

    Raises:
        UserError: it is not one.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the output of `smidgen train`: it has no recipe.yaml.")
    if not (folder / "metrics.json").is_file():  # an adapter there is of another run than the recipe
        raise UserError(
            f"The run in {folder} has not finished. Train it to its end: smidgen train {folder / 'recipe.yaml'}"
            + (" --resume" if checkpoint.exists(folder / "checkpoint") else "")
        )
    recipe = load_recipe(folder / "recipe.yaml")
    labels = tuple(manifest.read(folder / "adapter").labels or ())
    model, tokenizer = load_model(
        recipe.model, recipe.task, labels, seed=recipe.training.seed, precision=recipe.training.precision
    )
    model.to(this_process().device)
    adapter = load(model, folder / "adapter")
    model.eval()
    return Job(recipe, labels, model, tokenizer, adapter)


def _cut_note(cut: int, rows: int, source: str, room: int) -> list[str]:
    return [f"{cut} of {rows} texts of {source} are longer than {room} tokens; their ends are cut."] if cut else []


@contextlib.contextmanager
def _told_when_out_of_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search(
            "(not enough|can't allocate) memory", str(error)
        ):  # as a CPU's allocator says it
            raise
        raise UserError(
            "The memory does not suffice. Lower training.micro_batch_size (the result stays the same), set "
            "training.gradient_checkpointing=true, or lower data.max_length."
        ) from error
