"""The page in a real browser: no errors, no network, readable and within the screen, in light and dark."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from smidgen.report import write_page

from .comparisons import comparison, failed

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever asks for a host fails, and says so on the console
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--dump-dom",
]


def _pages() -> dict[str, dict[str, Any]]:
    unbroken = comparison(2, title="x" * 300, advice="y" * 300, command="z" * 300)
    unbroken["data"] |= {"name": "n" * 200, "notes": ["n" * 200], "labels": ["a" * 120, "b" * 120]}
    for row in unbroken["techniques"]:
        row |= {"title": "t" * 120, "summary": "s" * 120}
    unbroken["techniques"].append(failed(2, "e" * 300))
    return {
        "two-classes.html": comparison(9, classes=2),
        "77-classes.html": comparison(12, classes=77),
        "loss.html": comparison(4, classes=0, metric="loss"),
        "unbroken.html": unbroken,
    }


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_whole_in_a_browser(tmp_path: Path, theme: str) -> None:
    pages = _pages()
    for name, results in pages.items():
        write_page(results, tmp_path / name)
    shutil.copy(Path(__file__).parent / "look.html", tmp_path)
    run = subprocess.run(
        [
            str(BROWSER),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}",
            f"{(tmp_path / 'look.html').as_uri()}?{','.join(pages)}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(html.unescape(run.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line] == []
    assert len(found) == 2 * len(pages)
    for page, seen in found.items():
        assert seen["width"] <= seen["screen"], f"{page} is wider than the screen"
        assert seen["resources"] == [], f"{page} asked for something"
        assert seen["dark"] is (theme == "dark")
        assert seen["faint"] == [], f"{page} has texts of too little contrast"
        scores = [float(score) for score in seen["sorted"] if score]
        assert scores == sorted(scores, reverse="loss" in page), f"{page} does not sort"
    assert found["two-classes.html 360"]["charts"] == found["two-classes.html 1280"]["charts"] == 2
    assert found["77-classes.html 1280"]["cell"] == "40 of 47 rows recognized as class_2"
