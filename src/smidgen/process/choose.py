"""Choosing a technique, its size and its learning rate by successive halving, without a look at the test split.

Many entries are trained for a ninth of the steps, the best third of them for a third, and the best third of those for
all of them, each time anew with a schedule that comes to its end (successive halving: Jamieson & Talwalkar, 2016,
arXiv:1502.07943). The first entries are the techniques at their defaults; what comes after is drawn by Optuna's sampler
(TPE, multivariate and by technique) from what has done well. Everything stands in an SQLite file, so that a search goes
on after a stop, and several processes work on one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import UserError
from smidgen.process import finding
from smidgen.process.candidates import candidates
from smidgen.process.data import load_data
from smidgen.process.finding import Chart, Finding, Line, Point
from smidgen.process.late_scores import scores_on
from smidgen.process.recipe import Recipe
from smidgen.process.run_recipe import refuse_own
from smidgen.process.runs import POLL_SECONDS, check_can_begin, steps_of
from smidgen.process.search import FACTOR, RUNGS, WIDTH, Search, alive
from smidgen.process.technique import TechniqueSpec
from smidgen.process.trainer import Tell, Trainer
from smidgen.report import numbers
from smidgen.report.findings import write_findings
from smidgen.report.numbers import metric_named

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


CHOSEN = "chosen.yaml"
"""The recipe of what was chosen, in the output folder."""

STATES = {"complete": "came to the end", "pruned": "others were better", "fail": "failed", "running": "at work"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        number: of the trial.
        entry: as a recipe has it.
        validation: its score on the validation rows.
        test: its scores on the test split, which nothing else was judged by.
        trained: how many parameters.
        seconds: that all trials took, in training.
        tried: entries, of which most ended early.
        tests: how many entries were scored on the test split: one, unless a search went on to another choice.
        failures: what went wrong, by entry.
    """

    number: int
    entry: Any
    validation: float
    test: dict[str, Any]
    trained: int
    seconds: float
    tried: int
    tests: int
    failures: dict[str, str]

    def sentences(self, metric_name: str) -> list[str]:
        """The choice in words."""
        metric = metric_named(metric_name)
        return [
            f"Use {words_of(self.entry)}: it trains {numbers.count(self.trained)} parameters.",
            f"Validation {metric.word} {metric.score(self.validation)}{metric.unit}, "
            f"test {metric.word} {metric.score(self.test[metric_name])}{metric.unit}, which was looked at "
            + ("once." if self.tests == 1 else f"for {self.tests} choices, as the search went on."),
            f"{self.tried} entries were tried in {numbers.duration(self.seconds)} of training.",
        ]


def choose(recipe: Recipe, *, command: str, at_once: int = 1, tell: Tell = lambda line: None) -> Choice:
    """Search for the best entry that the budget allows, and write choose.json and chosen.yaml.

    Args:
        recipe: its `compare` lists the techniques to choose from, its `choose` the budget and the goal.
        command: how a person would go on after Ctrl-C.
        at_once: how many runs share the machine.
        tell: hears of each run that ended.

    Raises:
        UserError: the data or the recipe cannot be used, nothing meets the budget, or a search of another recipe is in
            the way.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    check_can_begin(recipe)
    refuse_own(Path(recipe.output) / CHOSEN)
    data = load_data(recipe.data, recipe.task)
    if recipe.choose.trials < len(recipe.compare):
        raise UserError(
            f"choose.trials={recipe.choose.trials} is below the {len(recipe.compare)} entries of compare, each of "
            "which is tried once at least."
        )
    steps = steps_of(recipe.training, len(data.train))
    if steps < WIDTH:
        raise UserError(
            f"The whole training has {steps} steps, and a ninth of them tells nothing about an entry. Raise "
            "training.epochs or lower training.batch_size."
        )
    space = candidates(recipe, data)
    folder = Path(recipe.output) / "choose"
    folder.mkdir(parents=True, exist_ok=True)
    with alive(folder) as process:
        trainer = Trainer(recipe, command=command, at_once=at_once, tell=tell)
        search = Search(recipe, data, space, folder, process, trainer)
        is_waiting = False
        while (going := search.begin()) or search.is_worked_on():
            if going:
                search.go(going)
                continue
            if not is_waiting:
                tell("Waiting for other processes, whose entries count.")
            is_waiting = True
            time.sleep(POLL_SECONDS)
        return _end(search)


def _end(search: Search) -> Choice:
    """Choose among the entries that came to the end, and score that one on the test split."""
    recipe, trials = search.recipe, search.trials()
    ended = [trial for trial in trials if trial.state.name == "COMPLETE"]
    complete = {trial.number: trial.intermediate_values[RUNGS - 1] for trial in ended}
    if not complete:
        raise UserError(_nothing(search))
    trained = {trial.number: int(trial.user_attrs.get("trained", 0)) for trial in trials}
    losses = {trial.number: float(trial.user_attrs[f"rank {RUNGS - 1}"][1]) for trial in ended}
    number = _winner(complete, losses, trained, recipe)
    entry, folder = next((t.user_attrs["entry"], t.user_attrs["folder"]) for t in trials if t.number == number)
    test = scores_on(search.run(TechniqueSpec.parse(entry), RUNGS - 1, folder).folder, "test")
    choice = Choice(
        number=number,
        entry=entry,
        validation=complete[number],
        test={name: value for name, value in test.items() if isinstance(value, float)},
        trained=trained[number],
        seconds=sum(trial.user_attrs.get("seconds", 0.0) for trial in trials),
        tried=sum("entry" in trial.user_attrs for trial in trials),
        tests=len(list(search.folder.glob("*/test.json"))),
        failures={words_of(t.user_attrs["entry"]): t.user_attrs["error"] for t in trials if "error" in t.user_attrs},
    )
    output = Path(recipe.output)
    chosen = {"technique": TechniqueSpec.parse(entry), "output": str(output / "chosen")}
    recipe.model_copy(update=chosen).save(output / CHOSEN)
    about = {**finding.about(recipe, search.trainer.command, choice.failures), "choice": dataclasses.asdict(choice)}
    found = _finding(choice, trials, recipe.metric)
    finding.write(found, about, output / "choose.json")
    write_findings({"choose": (found, about)}, recipe, output / "choose.html", what="Which technique?")
    return choice


def _finding(choice: Choice, trials: Sequence[FrozenTrial], metric_name: str) -> Finding:
    metric, rows = metric_named(metric_name), [_told(trial) for trial in trials]
    tried = [row for row in rows if row["entry"] is not None]
    tried.sort(key=lambda row: (-len(row["validation"]), -metric.good((row["validation"] or [0.0])[-1])))
    parts = [numbers.percent(1 / FACTOR**rung) for rung in reversed(range(RUNGS))]
    return Finding(
        title="What was chosen",
        answer=" ".join(choice.sentences(metric_name)),
        headings=("Entry", *(f"{part} of the steps" for part in parts), "Trained", "Time", "What became of it"),
        table=[
            (
                words_of(row["entry"]),
                *(metric.score(score) for score in row["validation"]),
                *("" for _ in range(RUNGS - len(row["validation"]))),
                numbers.count(row["trained"]),
                numbers.duration(row["seconds"]),
                "chosen"
                if row["number"] == choice.number
                else row["error"] or row["outside"] or STATES.get(row["state"], row["state"]),
            )
            for row in tried
        ],
        chart=Chart(
            kind="lines",
            title=f"Validation {metric.word} over the part of the steps; beside each entry its size and learning rate",
            across="Part of the steps, %",
            up=metric.heading,
            is_logarithmic=True,
            shortest=metric.shortest_axis,
            lines=[
                Line(
                    words_of(row["entry"]),
                    _brief(row["entry"]),
                    [
                        Point(100 / FACTOR ** (RUNGS - 1 - rung), metric.shown(score))
                        for rung, score in enumerate(row["validation"])
                    ],
                )
                for row in tried
                if len(row["validation"]) > 1
            ],
        ),
        notes=(
            "Each entry is trained anew for a part of the steps, with its whole schedule; the best third goes on. "
            "Scores are on the validation rows.",
        ),
        rows=rows,
    )


def words_of(entry: Any) -> str:
    """An entry of a recipe on one line: lora, rank 16, learning rate 0.001."""
    return " + ".join(
        ", ".join([name, *(f"{key.replace('_', ' ')} {value}" for key, value in options.items())])
        for name, options in _parts(entry)
    )


def _brief(entry: Any) -> str:
    """An entry where there is little room: lora 16 0.001."""
    return " + ".join(" ".join([name, *map(str, options.values())]) for name, options in _parts(entry))


def _parts(entry: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the options of each technique of an entry."""
    for part in entry if isinstance(entry, list) else [entry]:
        options = {"name": part} if isinstance(part, str) else dict(part)
        yield options.pop("name"), options


def _winner(
    scores: Mapping[int, float], losses: Mapping[int, float], trained: Mapping[int, int], recipe: Recipe
) -> int:
    """The number of the best trial, of equal scores that with the lowest loss, or of the smallest that is as good."""
    metric = metric_named(recipe.metric)
    best = min(scores, key=lambda number: (-metric.good(scores[number]), losses[number], trained[number]))
    if recipe.choose.goal == "best":
        return best
    near = [number for number in scores if metric.is_as_good(scores[number], scores[best], recipe.study.margin)]
    return min(near, key=lambda number: (trained[number], -metric.good(scores[number])))


def _nothing(search: Search) -> str:
    """Why no entry came to the end."""
    attributes = [trial.user_attrs for trial in search.trials()]
    if errors := [f"  {words_of(own['entry'])}: {own['error']}" for own in attributes if "error" in own]:
        return "\n".join(("No entry came to the end.", *errors))
    if outside := [own for own in attributes if "outside" in own]:
        least = min(outside, key=lambda own: own["memory"])
        allowed, taken = numbers.size(search.recipe.choose.memory or 0), numbers.size(least["memory"])
        return (
            f"choose.memory of {allowed} is met by nothing in compare. The least was {taken}, of "
            f"{words_of(least['entry'])}. Allow more, or lower training.micro_batch_size."
        )
    return "No entry came to the end. Allow more trials or minutes."


def _told(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "entry": trial.user_attrs.get("entry"),
        "state": trial.state.name.lower(),
        "validation": list(trial.intermediate_values.values()),
        "trained": trial.user_attrs.get("trained"),
        "seconds": trial.user_attrs.get("seconds"),
        "error": trial.user_attrs.get("error"),
        "outside": trial.user_attrs.get("outside"),
    }
