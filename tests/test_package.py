"""The package as a user gets it: its public names, what importing it costs, its pins, and its wheel."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smidgen

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(pin.name): pin
    for pin in map(Requirement, re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
}
HEAVY = {"torch", "transformers", "accelerate", "datasets", "sklearn", "numpy", "pandas"}


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_every_public_name_is_there_and_every_name_that_is_there_is_public() -> None:
    assert len(set(smidgen.__all__)) == len(smidgen.__all__)
    assert sorted(dir(smidgen)) == sorted([*smidgen.__all__, "__version__"])
    assert [name for name in smidgen.__all__ if getattr(smidgen, name) is None] == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = python("-c", "import smidgen, sys; print(*sys.modules)").split()
    assert HEAVY & set(loaded) == set()


@pytest.mark.parametrize("command", ["", "demo", "plan", "train", "evaluate", "predict", "compare", "merge", "methods"])
def test_help_loads_nothing_heavy(command: str) -> None:
    arguments = ["smidgen", *command.split(), "--help"]
    code = f"""
import runpy, sys
sys.argv = {arguments}
try:
    runpy.run_module("smidgen", run_name="__main__")
except SystemExit as stopped:
    print(*sys.modules, f"exit={{stopped.code or 0}}")
"""
    printed = python("-c", code)
    assert "Usage" in printed
    loaded = printed.splitlines()[-1].split()
    assert HEAVY & set(loaded) == set()
    assert "exit=0" in loaded


def test_the_version_is_the_projects() -> None:
    assert smidgen.__version__ == PROJECT["version"]


def needed_by(requirement: Requirement) -> list[Requirement]:
    """What an installed package needs in turn, here and with the extras asked for."""
    needed = [Requirement(text) for text in importlib.metadata.requires(requirement.name) or []]
    extras = ["", *requirement.extras]
    return [
        each for each in needed if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def test_everything_that_make_installs_is_pinned_to_what_is_installed() -> None:
    """From the project's requirements down: each package is pinned here, or exactly by the package that needs it."""
    extras = PROJECT["optional-dependencies"]
    waiting = [Requirement(text) for text in [*PROJECT["dependencies"], *extras["test"], *extras["dev"]]]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}: {installed} is installed"
        if pin := PINS.get(canonicalize_name(requirement.name)):
            assert pin.specifier.contains(installed), f"{pin}: {installed} is installed"
        else:
            operators = {part.operator for part in requirement.specifier}
            assert operators == {"=="}, f"{requirement} is not in constraints.txt"
        waiting += needed_by(requirement)
    names = {canonicalize_name(Requirement(text).name) for text in seen}
    assert PINS.keys() <= names, f"pinned, but needed by nothing: {sorted(PINS.keys() - names)}"


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    python("-m", "pip", "wheel", *options, str(tmp_path))
    with zipfile.ZipFile(tmp_path / f"smidgen-{smidgen.__version__}-py3-none-any.whl") as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel.namelist())
    files = {file.relative_to(tmp_path / "src") for file in (tmp_path / "src" / "smidgen").rglob("*") if file.is_file()}
    assert packed == {file.as_posix() for file in files}
    assert "smidgen/py.typed" in packed
