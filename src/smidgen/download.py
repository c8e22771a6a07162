"""One archive of a package index, by name, version and hash, fetched by pip or npm; nothing in it is run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smidgen.errors import UserError
from smidgen.files import sha256


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive on a package index.

    Attributes:
        package: its name there.
        version: the one that was tested.
        sha256: of the archive.
        megabytes: its size.
        kind: a wheel or a source archive, which pip fetches, or an archive of npm's.
    """

    package: str
    version: str
    sha256: str
    megabytes: float
    kind: Literal["wheel", "source", "npm"] = "wheel"

    @property
    def requirement(self) -> str:
        """The package as its tool knows it: name==version for pip, name@version for npm."""
        return f"{self.package}{'@' if self.kind == 'npm' else '=='}{self.version}"

    @property
    def tool(self) -> str:
        """What fetches it."""
        return "npm" if self.kind == "npm" else "pip"


def download(archive: Archive, folder: Path) -> Path:
    """Put the archive into `folder`, an empty one, and return its path.

    Raises:
        UserError: there is no pip or npm, it cannot get the archive, or that is another than the one with that hash.
    """
    (folder / "archive").mkdir()
    fetched = _npm(archive, folder) if archive.kind == "npm" else _pip(archive, folder)
    if fetched.returncode:
        raise UserError(_failure(archive, fetched.stderr))
    (path,) = (folder / "archive").iterdir()
    if (found := sha256(path)) != archive.sha256:
        raise UserError(f"{path.name} is not the file that was tested: its SHA-256 is {found}, not {archive.sha256}.")
    return path


def _npm(archive: Archive, folder: Path) -> subprocess.CompletedProcess[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{archive.requirement} is fetched with npm, which is not here. Install Node.js, which has it.")
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination=archive", archive.requirement]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _pip(archive: Archive, folder: Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{archive.requirement} is fetched with pip, which {sys.executable} does not have. "
            f"Run: {sys.executable} -m ensurepip"
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=2", "--no-deps", "--require-hashes", "--dest=archive", "--requirement=requirements.txt"]
    environment = dict(os.environ)
    if archive.kind == "source":
        command += ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
        environment["PYTHONPATH"] = str(_stand_in_for_setuptools(archive, folder / "stand-in"))
    else:
        command += ["--only-binary=:all:"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _failure(archive: Archive, stderr: str) -> str:
    said = "\n".join(line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING"))
    failed = f"{archive.tool} could not download {archive.requirement} ({archive.megabytes} MB):\n{said}\n"
    if archive.kind == "npm":
        return f"{failed}A network is needed the first time only. To do without, copy another machine's SMIDGEN_CACHE."
    by_hand = "python -m pip download --no-deps " + ("--no-binary=:all: " if archive.kind == "source" else "")
    return (
        f"{failed}A network is needed the first time only. To do without one here, run this where there is one, "
        f"and set PIP_FIND_LINKS here to the folder with the file that it gives:\n    {by_hand}{archive.requirement}"
    )


def _stand_in_for_setuptools(archive: Archive, folder: Path) -> Path:
    """Write a `setuptools` that answers pip from the archive's own PKG-INFO.

    pip keeps no source archive before a build backend has named its metadata; the real one would run its setup.py.
    """
    dist_info = f"{archive.package.replace('-', '_')}-{archive.version}.dist-info"
    package = folder / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(
        f"""
import pathlib, shutil, sys

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{dist_info}")
    folder.mkdir()
    shutil.copyfile("PKG-INFO", folder / "METADATA")
    return folder.name

__legacy__ = sys.modules[__name__]  # the backend of an archive without a pyproject.toml
""",
        encoding="utf-8",
    )
    return folder
