"""The pages: HTML files, each of which holds everything that it needs and never asks the network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smidgen.files import write_text
from smidgen.report import confusion, numbers
from smidgen.report.chart import FORMATS
from smidgen.report.curves import Against, Value, curves
from smidgen.report.entries import Entry, entries_of, ranked, subject_of, within_sentence
from smidgen.report.interval import intervals, swatch
from smidgen.report.numbers import Metric, metric_named
from smidgen.report.results import Comparison
from smidgen.report.tradeoff import tradeoff

if TYPE_CHECKING:
    from smidgen.process.inspection import Inspection
    from smidgen.process.recipe import Recipe

_LOADER = PackageLoader("smidgen.report")
_ENVIRONMENT = Environment(
    loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters.update(
    count=numbers.count,
    percent=numbers.percent,
    duration=numbers.duration,
    size=numbers.size,
    swatch=swatch,
    within_sentence=within_sentence,
    breakable=lambda label: Markup("_<wbr>").join(label.split("_")),
)


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison to `path`, atomically.

    Args:
        comparison: the contents of compare.json; what is missing in it is missing in the page.
        path: the HTML file.

    Raises:
        ValueError: a value has the wrong type, such as a text where a number belongs.
        UserError: the disk is full.
    """
    _write(path, _render(Comparison.model_validate(comparison)))


def write_data_page(inspection: Inspection, recipe: Recipe, command: str, path: Path) -> None:
    """Write the page of what was found in a recipe's data to `path`, atomically.

    Raises:
        UserError: the disk is full.
    """
    render_page("data.html", path, recipe=recipe, found=inspection, command=command)


def render_page(template: str, path: Path, *, recipe: Recipe, **values: Any) -> None:
    """Write the page of a template about a recipe to `path`, atomically.

    Raises:
        UserError: the disk is full.
    """
    title, model = _ending(recipe.data.train, 1), _ending(recipe.model, 2)
    values = {**values, "title": title, "model": model, "recipe": recipe}
    _write(path, _ENVIRONMENT.get_template(template).render(**values, **_assets()))


def _ending(source: str, parts: int) -> str:
    """The last parts of a path; what is embedded or on the hub as it is."""
    return "/".join(Path(source).parts[-parts:]) if source.startswith(("/", ".")) else source


def _write(path: Path, html: str) -> None:
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair in a label is not UTF-8


def _assets() -> dict[str, Any]:
    """The style and the script of every page, and the hash by which the script is the only one that may run."""
    script = _source("script.js")
    return {
        "style": _source("style.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _render(comparison: Comparison) -> str:
    """The page as HTML: texts are escaped by the template and the SVG writer, and no script but ours may run."""
    metric = metric_named(comparison.metric)
    entries = entries_of(comparison)
    done = [entry for entry in entries if entry.technique.done]
    return _ENVIRONMENT.get_template("page.html").render(
        comparison=comparison,
        created=_date(comparison.created),
        metric=metric,
        entries=ranked(entries, metric),
        done=done,
        subject=subject_of(comparison, entries, metric),
        baseline=next((entry for entry in done if entry.is_baseline), None),
        intervals=intervals(entries, metric),
        tradeoff=_at_each_width(tradeoff(entries, metric, layout) for layout in FORMATS),
        curves=_curve_views(entries, comparison.metric, metric),
        with_classes=[entry for entry in done if entry.technique.confusion or entry.technique.per_class],
        confusion=confusion,
        **_assets(),
    )


def _source(name: str) -> Markup:
    """A file of ours as it is, to stand in the page unescaped."""
    return Markup(_LOADER.get_source(_ENVIRONMENT, name)[0])


def _at_each_width(charts: Iterable[Markup | None]) -> Markup:
    """One chart, drawn for each width; empty when there was nothing to draw."""
    return Markup("").join(chart for chart in charts if chart is not None)


def _curve_views(entries: Sequence[Entry], metric_name: str, metric: Metric) -> list[tuple[str, Markup]]:
    """The views of the learning curves that have something to show, each with its name."""
    values: list[tuple[Value, Metric]] = [("validation_loss", metric_named("loss"))]
    if metric_name != "loss":
        values.insert(0, ("validation_score", metric))
    against: list[tuple[Against, str]] = [("epoch", "by epoch"), ("seconds", "by time")]
    views = [
        (f"{shown.title} {words}", _at_each_width(curves(entries, shown, value, axis, layout) for layout in FORMATS))
        for value, shown in values
        for axis, words in against
    ]
    return [(name, chart) for name, chart in views if chart]


def _date(created: str) -> str:
    """An ISO time as a date for people, 23 November 2026; any other text as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y}"
