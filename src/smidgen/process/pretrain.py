"""Pre-training: a model, new or not, reads a corpus; the result is a model's folder, to be fine-tuned like any other.

The tokens of the corpus lie on the disk (see `corpus`), whatever its length; a run that is stopped goes on to the same
bits, as fine-tuning does, with the same loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smidgen import files
from smidgen.adapter import Adapter
from smidgen.errors import UserError
from smidgen.layers import is_sharded
from smidgen.merging import check_mergeable
from smidgen.process import checkpoint
from smidgen.process.blocks import VALIDATION, Blocks, Causal, CorpusRows, Masked
from smidgen.process.corpus import Streams, open_streams, text_files, write_streams
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.evaluate import evaluate
from smidgen.process.memory import peak_memory, told_when_it_runs_out
from smidgen.process.models import kind, longest_text, quietly
from smidgen.process.new_model import check_config, load_tokenizer, model_and_tokenizer, objective_of, write_tokenizer
from smidgen.process.only_one import only_one
from smidgen.process.opening import attach_technique, train_in_fp32
from smidgen.process.optimizer import Rates, rates_of
from smidgen.process.parallel import in_main, this_process, whole
from smidgen.process.pretrain_recipe import NewModel, PretrainRecipe
from smidgen.process.progress import Progress
from smidgen.process.run import begin, check_rows, check_start
from smidgen.process.scores import Scores, perplexity
from smidgen.process.train import train
from smidgen.process.vocabulary import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCRATCH = ".pretraining"
"""What the run needs while it lasts: the tokens of the corpus, and a tokenizer that was trained on it."""

NEW_RATE = 5e-4
"""The learning rate of a new model; one that was trained before has its technique's."""


@dataclasses.dataclass
class Pretraining:
    """Everything that a recipe needs to run.

    Attributes:
        recipe: what to do.
        objective: what is to be found.
        model: with the adapter on it that trains it.
        tokenizer: the model's.
        adapter: all of the model, or what the technique adds to it.
        streams: the corpus.
        task: how a block is made into a row.
        known: hashes of the recipe, the streams and the text that they are of.
    """

    recipe: PretrainRecipe
    objective: Objective
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    streams: Streams
    task: Causal | Masked
    known: Mapping[str, str | None]

    @property
    def rows(self) -> CorpusRows:
        """What the model learns from."""
        training = self.recipe.training
        return CorpusRows(
            self.streams.train, self.task, training.batch_size, training.seed, scorings=training.evaluations
        )

    @property
    def validation(self) -> list[Encoded]:
        """The blocks that are scored."""
        blocks = Blocks(self.streams.validation, self.task, VALIDATION)
        return [blocks[number] for number in range(min(len(blocks), self.recipe.corpus.validation_blocks))]

    @property
    def rates(self) -> Rates:
        """The technique's learning rates, and that of what lies outside the base model."""
        own = NEW_RATE if isinstance(self.recipe.model, NewModel) else None
        return rates_of(self.recipe, self.adapter, kind(self.model), default=own)

    def score(self) -> Scores:
        """The loss of a token in the validation blocks, and its perplexity."""
        training = self.recipe.training
        return evaluate(
            self.model,
            self.validation,
            labels=(),
            pad_id=pad_id(self.tokenizer),
            most_tokens=self.recipe.training.micro_batch_tokens,
            batch_size=training.rows_at_once,
            precision=training.precision,
        )


Tell = Callable[[Pretraining], object]


def pretrain(
    recipe: PretrainRecipe, *, resume: bool = False, quiet: bool = False, tell: Tell = lambda job: None
) -> dict[str, Any]:
    """Train a language model, while no other process does so in the same folder.

    Args:
        recipe: what on what.
        resume: whether to go on from the checkpoint in the output folder.
        quiet: whether to show no progress.
        tell: hears of what is to be trained before it is.

    Returns:
        The contents of metrics.json.

    Raises:
        UserError: as `prepare` and `run`.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    with only_one(Path(recipe.output)):
        job = prepare(recipe, resume=resume)
        tell(job)
        return run(job, resume=resume, quiet=quiet)


def prepare(recipe: PretrainRecipe, *, resume: bool = False) -> Pretraining:
    """Load or make what a recipe names: the tokenizer, the model, and in the output folder the tokens of the corpus.

    Raises:
        UserError: a part of it cannot be used, they do not go together, or an unfinished run is in the way.
    """
    check_start(recipe, resume=resume)
    folder = Path(recipe.output)
    if (folder / "model").exists() and not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds a model of your own, which the run's would replace. Give another output.")
    if (folder / "model").is_dir():  # what is hidden there is not of ours
        files.check_replaceable(folder / "model", [file.name for file in files.shown_in(folder / "model")])
    try:
        job = _prepared(recipe)
        check_rows(recipe, job.known, resume=resume)
    except UserError:
        this_process().wait_for_everyone()  # none reads any more what goes now; all of them have this error
        if this_process().is_main_process and not checkpoint.exists(folder / "checkpoint"):
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            with contextlib.suppress(OSError):  # it is not there, or holds more
                folder.rmdir()
        raise
    return job


def _prepared(recipe: PretrainRecipe) -> Pretraining:
    corpus, scratch = recipe.corpus, Path(recipe.output) / SCRATCH
    known = {"recipe": recipe.fingerprint(), "text": recipe.text_hash()}
    paths = text_files(corpus.train)
    held = text_files(corpus.validation) if corpus.validation else None
    if held and (both := sorted(set(paths) & set(held))):
        raise UserError(f"corpus.validation has a file that is trained on: {both[0]}.")
    objective = objective_of(recipe)
    in_main(lambda: _write(recipe, objective, paths, held))
    model, tokenizer = model_and_tokenizer(recipe, objective, scratch)
    _check_length(recipe, model, tokenizer)
    task, streams = _task(recipe, objective, tokenizer), open_streams(scratch / "tokens")
    for use, stream in (("train", streams.train), ("validate", streams.validation)):
        if not task.count(stream):
            raise UserError(
                f"The corpus has {len(stream):,} tokens to {use} on, which make no block of {corpus.length}. Give more "
                "text, lower corpus.length, or set aside more by corpus.validation_share."
            )
    model.to(this_process().device)
    torch.manual_seed(recipe.training.seed)
    adapter = attach_technique(recipe.technique, model, tokenizer)
    try:
        check_mergeable(adapter)
    except ValueError as error:
        raise UserError(
            f"technique={recipe.technique.name}, and a pre-training's result is one model: {error}"
        ) from error
    if recipe.training.precision == "bf16":
        train_in_fp32(adapter)
    known["data"] = streams.fingerprint
    return Pretraining(recipe, objective, model, tokenizer, adapter, streams, task, known)


def _write(recipe: PretrainRecipe, objective: Objective, paths: Sequence[Path], held: Sequence[Path] | None) -> None:
    """Put a new tokenizer and the tokens of the corpus in the output folder."""
    scratch = Path(recipe.output) / SCRATCH
    if isinstance(recipe.model, NewModel):
        check_config(recipe.model, objective)
        if not checkpoint.exists(scratch.parent / "checkpoint"):  # a run that goes on has the one that it began with
            write_tokenizer(recipe, objective, paths, scratch)
    tokenizer = load_tokenizer(recipe, scratch)
    end = tokenizer.eos_token_id if objective == "causal" else tokenizer.sep_token_id
    if end is None:
        raise UserError(f"{type(tokenizer).__name__} has no token for the end of a document.")
    write_streams(scratch / "tokens", paths, held, tokenizer, end=end, share=recipe.corpus.validation_share)


def run(job: Pretraining, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, keep the best weights, and write model/ and metrics.json.

    Args:
        job: its recipe's `output` is the folder.
        resume: whether to go on from the checkpoint there.
        quiet: whether to show no progress.

    Returns:
        The contents of metrics.json.

    Raises:
        UserError: the memory does not suffice, or the loss is not finite.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    recipe, folder, is_main = job.recipe, Path(job.recipe.output), this_process().is_main_process
    stopped = folder / "checkpoint"
    resume = begin(recipe, resume=resume)
    with told_when_it_runs_out():
        before = job.score()
        progress = train(
            job.model,
            job.adapter,
            job.rows,
            job.score,
            recipe=recipe,
            rates=job.rates,
            pad_id=pad_id(job.tokenizer),
            fingerprint=job.streams.fingerprint,
            resume=resume,
            quiet=quiet,
        )
        peak = peak_memory(job.model.device)
    metrics = _metrics(job, progress, before, peak)
    job.adapter.merge()
    tied = {name for name, _ in job.model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in job.model.named_parameters()}
    state = {name: tensor for name, tensor in job.model.state_dict().items() if name not in tied}
    weights = {name: whole(tensor) for name, tensor in state.items()} if is_sharded(job.model) else None
    if is_main:
        with quietly(), files.new_folder(folder / "model") as new:
            job.model.save_pretrained(new, state_dict=weights)
            job.tokenizer.save_pretrained(new)
        files.write_json(folder / "metrics.json", metrics)
        for left in (stopped, folder / SCRATCH):
            shutil.rmtree(left, ignore_errors=True)
    this_process().wait_for_everyone()
    return metrics


def _metrics(job: Pretraining, progress: Progress, before: Scores, peak: int) -> dict[str, Any]:
    kept = progress.curve[progress.best_epoch]
    return {
        **job.known,
        "objective": job.objective,
        "before": _summary(before["loss"]),
        "after": _summary(kept["validation_loss"]),
        "best_epoch": kept["epoch"],
        "curve": progress.curve,
        "corpus_tokens": len(job.streams.train),
        "validation_tokens": len(job.streams.validation),
        "trained": job.adapter.trainable,
        "total": job.adapter.total,
        "seconds": progress.seconds,
        "steps": progress.step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak,
    }


def _summary(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": perplexity(loss)}


def _check_length(recipe: PretrainRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    longest = longest_text(model, tokenizer)
    if recipe.corpus.length > longest:
        raise UserError(f"corpus.length={recipe.corpus.length} is more than the {longest} tokens that the model takes.")


def _task(recipe: PretrainRecipe, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Causal | Masked:
    corpus = recipe.corpus
    if objective == "causal":
        return Causal(corpus.length)
    try:
        task = Masked.of(
            tokenizer,
            length=corpus.length,
            share=corpus.masked,
            whole_words=corpus.whole_words,
            seed=recipe.training.seed,
        )
    except ValueError as error:
        raise UserError(f"objective=masked: {error}") from error
    if task.room < 1:
        raise UserError(f"corpus.length={corpus.length} leaves no room beside the tokenizer's own tokens.")
    return task
