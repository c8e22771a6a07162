"""The table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from smidgen.report import print_table

from .comparisons import comparison, failed


def _printed(results: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(print_table(results))
    return capture.get()


def test_a_row_says_what_a_technique_scores_and_costs() -> None:
    row = next(line for line in _printed(comparison()).splitlines() if line.startswith("LoRA"))
    assert " ".join(row.split()) == "LoRA 85.8 ±3.0 −0.8 25 % 1 min 30 s 0.9 GB 22.5 MB"


def test_twelve_techniques_fit_80_columns_without_a_cut_number() -> None:
    for metric in ("accuracy", "loss"):
        text = _printed(comparison(12, metric=metric))
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "…" not in text
        assert len(text.splitlines()) == 14


def test_a_technique_that_waits_runs_or_failed_says_so() -> None:
    results = comparison()
    results["techniques"] = [
        failed(0),
        failed(1) | {"status": "running"},
        {"name": "lora", "title": "LoRA", "status": "waiting"},
    ]
    text = _printed(results)
    assert all(status in text for status in ("failed", "running", "waiting"))


def test_a_title_is_text_and_not_markup() -> None:
    results = comparison(1)
    results["techniques"][0]["title"] = "[red]LoRA[/red] [/]"
    assert "[red]LoRA[/red] [/]" in _printed(results)
