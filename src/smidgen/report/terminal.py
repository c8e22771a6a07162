"""What the command line prints: the plan, the scores of a run, the techniques, and a comparison while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smidgen.report import numbers
from smidgen.report.table import print_table

if TYPE_CHECKING:
    from smidgen.process.contrast import Contrast
    from smidgen.process.finding import Finding
    from smidgen.process.harness import TaskScore
    from smidgen.process.inspection import Inspection
    from smidgen.process.plan import Plan
    from smidgen.process.pretrain import Pretraining


LONGEST_TEXT = 160
"""Characters of a row's text on a terminal."""


def plan_lines(plan: Plan) -> Iterator[str | Text]:
    """The plan in lines: what is trained, what stays frozen, what it costs."""
    total = plan.trainable + plan.frozen
    yield Text(plan.technique, style="bold")
    for line in plan.options:
        yield f"  {line}"
    share = numbers.percent(plan.trainable / total)
    yield f"Trained  {numbers.count(plan.trainable)} of {numbers.count(total)} parameters ({share})"
    for line in (*plan.matched, *plan.own):
        yield f"  {line}"
    yield f"Frozen   {numbers.count(plan.frozen)} parameters"
    if plan.frozen_blocks:
        yield f"  blocks that are computed once for each row, their states kept: {plan.frozen_blocks}"
    if plan.noisy_blocks:
        yield f"  blocks that would be, with training.frozen_dropout=false: {plan.noisy_blocks}"
    if plan.virtual_tokens:
        yield f"Text     each row gives {plan.virtual_tokens} positions to virtual tokens"
    yield f"Data     {numbers.count(plan.rows)} rows, {numbers.count(plan.tokens)} tokens, {plan.steps} steps"
    yield f"Disk     {numbers.size(plan.disk_bytes)} for the adapter"
    yield f"Memory   about {numbers.size(plan.memory_bytes)} at the peak (estimated from a trial step)"
    yield f"Time     about {numbers.duration(plan.seconds)} of training (estimated from a trial step)"


def inspection_lines(found: Inspection, *, most: int = 3) -> Iterator[str]:
    """What was found in the data: sizes, lengths, labels, and what to look at with some rows of each."""
    sizes = ", ".join(f"{numbers.count(count)} {split}" for split, count in found.rows.items())
    yield f"Rows     {sizes}" + (f"; language {found.language}" if found.language else "")
    if found.labels:
        first, last = found.labels[0], found.labels[-1]
        yield (
            f"Labels   {len(found.labels)}, from {numbers.count(first['train'])} to train on ({first['label']}) to "
            f"{numbers.count(last['train'])} ({last['label']})"
        )
    for row in found.lengths:
        cut = f", {numbers.count(row.cut)} are cut" if row.cut else ""
        yield (
            f"Tokens   {row.split}: {row.median} in the middle, {row.most} in 95 of 100 rows, {row.longest} at most; "
            f"{found.limit} fit{cut}"
        )
    for finding in found.findings:
        yield f"\n! {finding.title}: {finding.summary}"
        for shown in finding.rows[:most]:
            note = f"  ({_line_of(shown.note)})" if shown.note else ""
            yield f"    {shown.split} {shown.number}: {_line_of(shown.text)}{note}"
        if left := len(finding.rows[most:]) + finding.more:
            yield f"    and {numbers.count(left)} more"
    if found.good:
        yield "\n  " + " ".join(found.good)
    if found.notes:
        yield "\n  " + " ".join(found.notes)


def _line_of(text: str) -> str:
    """A text on one line that a terminal shows as it is, and not too long."""
    plain = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )
    return plain if len(plain) <= LONGEST_TEXT else f"{plain[: LONGEST_TEXT - 1]}…"


def contrast_lines(found: Contrast, first: str, second: str) -> Iterator[str]:
    """Two runs beside each other, and what to make of it."""
    metric = numbers.metric_named(found.metric)
    for name, score in zip((first, second), found.scores, strict=True):
        yield f"{metric.title} of {name}: {metric.score(score)}{metric.unit}"
    interval = metric.difference_interval(*found.interval)
    yield f"Difference: {metric.difference(found.difference)}, 95 % interval {interval} (paired, over the test rows)"
    if found.p is not None:
        yield (
            f"Right in {first} alone: {found.only_first} rows, in {second} alone: {found.only_second}; "
            f"p = {found.p:.2g} (McNemar, exact)"
        )
    points = f"{found.margin:.3g}"
    if metric.percent:
        points = f"{100 * found.margin:g} point{'s' if found.margin != 0.01 else ''}"
    yield {
        "better": f"{first} is better than {second}.",
        "worse": f"{second} is better than {first}.",
        "same": f"The two are the same within {points}.",
        "open": f"These test rows are too few to tell the two apart, or to call them the same within {points}.",
    }[found.verdict]


def finding_lines(found: Finding, width: int) -> Iterator[str | Text | Table]:
    """What was found: the answer, the table, or its rows one below the other where it is too wide, and the notes."""
    yield Text(found.title, style="bold")
    yield f"{found.answer}\n"
    cells = [max(map(len, column), default=0) for column in zip(*found.table, strict=True)] or [0] * len(found.headings)
    words = [max(map(len, heading.split()), default=0) for heading in found.headings]
    whole = [max(cell, len(heading)) for cell, heading in zip(cells, found.headings, strict=True)]
    least = [max(pair) for pair in zip(cells, words, strict=True)]
    widths = whole if sum(whole) + 2 * len(whole) <= width else least
    if sum(widths) + 2 * len(widths) <= width:
        table = Table(box=None, pad_edge=False)
        for column, heading in enumerate(found.headings):
            table.add_column(Text(heading), justify="right" if column else "left", width=widths[column])
        for row in found.table:
            table.add_row(*map(Text, row))
        yield table
    else:
        for first, *rest in found.table:
            yield Text(first, style="bold")
            yield from (f"  {name}: {cell}" for name, cell in zip(found.headings[1:], rest, strict=True) if cell)
    for note in found.notes:
        yield f"\n{note}"


def pretraining_lines(job: Pretraining) -> Iterator[str]:
    """What a pre-training trains, and on what."""
    task, model = job.recipe.corpus, job.recipe.model
    start = f"new {model.type}" if not isinstance(model, str) else model
    goal = f"{numbers.percent(task.masked)} of the tokens masked" if job.objective == "masked" else "the next token"
    share = numbers.percent(job.adapter.trainable / job.adapter.total)
    yield f"Model    {start}, {numbers.count(job.adapter.total)} parameters, {share} trained"
    yield f"Tokens   a vocabulary of {numbers.count(len(job.tokenizer))}; to find: {goal}"
    yield (
        f"Corpus   {numbers.count(len(job.streams.train))} tokens to train on, "
        f"{numbers.count(len(job.streams.validation))} to validate on, in blocks of {task.length}"
    )


def score_lines(scores: Mapping[str, Any]) -> Iterator[str | Table]:
    """The scores of a run: the summary, every class, and the confusion matrix while it fits a terminal."""
    if not scores:
        yield "The test split was not scored (score_test: false)"
        return
    if "per_class" not in scores:
        yield f"Loss {scores['loss']:.4f}   perplexity {scores['perplexity']:.2f}"
        texts = {"exact_match": "Exact match", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
        yield "   ".join(f"{title} {100 * scores[name]:.1f} %" for name, title in texts.items())
        return
    titles = {"accuracy": "Accuracy", "f1": "F1 of spans", "precision": "precision", "recall": "recall"}
    titles |= {"macro_f1": "macro-F1", "ece": "calibration error"}
    parts = [f"{title} {100 * scores[name]:.1f} %" for name, title in titles.items() if name in scores]
    yield "   ".join(parts + ([f"Brier score {scores['brier']:.3f}"] if "brier" in scores else []))
    classes = scores["per_class"]
    table = Table("Class", box=None, pad_edge=False)
    for heading in ("Precision", "Recall", "F1", "Spans" if "row_spans" in scores else "Rows"):
        table.add_column(heading, justify="right")
    for entry in classes:
        known = (entry[name] for name in ("precision", "recall", "f1"))
        shares = [numbers.MISSING if share is None else f"{100 * share:.1f}" for share in known]
        table.add_row(Text(entry["label"]), *shares, str(entry["support"]))
    yield table
    if len(classes) <= 10 and "confusion" in scores:
        confusion = Table("Class", box=None, pad_edge=False)
        for entry in classes:
            confusion.add_column(Text(f"as {entry['label']}"))
        for entry, counts in zip(classes, scores["confusion"], strict=True):
            confusion.add_row(Text(entry["label"]), *map(str, counts))
        yield confusion


def harness_table(found: Sequence[TaskScore]) -> Table:
    """Scores of lm-evaluation-harness, with the adapter and without."""
    table = Table(box=None, pad_edge=False)
    for heading in ("Task", "Metric", "With the adapter", "Base model"):
        table.add_column(heading, justify="left" if heading in ("Task", "Metric") else "right")

    def cell(value: float | None, error: float | None) -> str:
        if value is None:
            return numbers.MISSING
        return f"{value:.4f}" + (f" ±{error:.4f}" if error is not None else "")

    for score in found:
        cells = (cell(score.value, score.error), cell(score.base, score.base_error))
        table.add_row(Text(score.task), Text(score.metric), *cells)
    return table


def methods_json() -> list[dict[str, Any]]:
    """The techniques with their options, for a program to read."""
    from smidgen.methods import METHODS

    return [
        {
            "name": name,
            "title": method.title,
            "paper": method.paper,
            "about": (method.__doc__ or "").splitlines()[0],
            "learning_rates": dict(method.learning_rates),
            "options": {field.name: field.default for field in dataclasses.fields(method)},
        }
        for name, method in METHODS.items()
    ]


def methods_table() -> Table:
    """The techniques for people."""
    table = Table("Name", "What it learns", box=None, pad_edge=False)
    for entry in methods_json():
        options = ", ".join(f"{name}={value}" for name, value in entry["options"].items())
        about = Text(f"{entry['about']}\n").append(f"{entry['paper']}; {options or 'no options'}\n", style="dim")
        table.add_row(Text(entry["name"], style="bold"), about)
    return table


@contextlib.contextmanager
def live(console: Console) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a comparison while it runs: a table that is drawn anew on a terminal, a line a technique elsewhere."""
    if not console.is_terminal:
        told: set[str] = set()

        def tell(comparison: Mapping[str, Any]) -> None:
            for row in comparison["techniques"]:
                if row["name"] not in told and row["status"] in ("done", "failed"):
                    told.add(row["name"])
                    console.print(Text(_line(row, comparison["metric"])), soft_wrap=True)

        yield tell
        return
    with Live(console=console, refresh_per_second=4, transient=False) as screen:
        yield lambda comparison: screen.update(_screen(comparison))


def _line(row: Mapping[str, Any], metric_name: str) -> str:
    if row["status"] == "failed":
        return f"{row['title']}: failed: {row['error']}"
    metric = numbers.metric_named(metric_name)
    score = f"{metric.word} {metric.score(row['score'])}{metric.unit}"
    return f"{row['title']}: {score}, {numbers.percent(row['share'])} trained, {numbers.duration(row['seconds'])}"


def _screen(comparison: Mapping[str, Any]) -> Table:
    """The table, and under it what the running techniques do now."""
    table = print_table(comparison)
    running = [row for row in comparison["techniques"] if row["status"] == "running" and row.get("progress")]
    table.caption = Text("\n".join(f"{row['title']}: {_progress(row['progress'])}" for row in running))
    return table


def _progress(progress: Mapping[str, Any]) -> str:
    parts = [f"epoch {progress['epoch']}", f"step {progress['step']}"]
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    return ", ".join(parts)
