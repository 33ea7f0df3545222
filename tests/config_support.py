"""Files of other tools with real repositories, and the secret that opens them."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from commands_support import run

BORGMATIC = Path(sys.executable).with_name("borgmatic")
SECRET = f"geheim-4711-{os.getpid()}"
"""No other's, of tests that run at the same time: one looks for it in every process."""
FORMAT = "'{hostname}-{now:%Y-%m-%dT%H:%M:%S.%f}'"


@functools.cache
def _new_restic_repository() -> Path:
    """Make a repository, once: a password takes seconds by design."""
    place = Path(tempfile.mkdtemp(prefix="blockferry-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    run("restic", "init", "-r", place / "repository", env=os.environ | {"RESTIC_PASSWORD": SECRET})
    return place / "repository"


def restic_repository(path: Path) -> Path:
    """Put a new restic repository, whose password is SECRET, at a path."""
    return Path(shutil.copytree(_new_restic_repository(), path))


def real(program: str, version: str) -> str:
    """Return the path of another tool, or skip: no registry of packages has autorestic, nor a new resticprofile."""
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed: put one on PATH ({version} is known to do)")
    return found


def real_autorestic() -> str:
    return real("autorestic", "1.8.3")


def real_resticprofile() -> str:
    return real("resticprofile", "0.23.0")


@dataclasses.dataclass
class Job:
    """A file of borgmatic's with its repository, a source directory and a log that its commands write to."""

    file: Path
    repository: Path
    borg: str

    def write(self, more: str = "", *, passphrase: str = f"encryption_passphrase: {SECRET}") -> None:
        self.file.write_text(
            f"{passphrase}\nlocal_path: {self.borg}\nsource_directories: [{self.file.parent / 'source'}]\n"
            f"repositories: [{{path: {self.repository}, label: nas}}]\n{more}\n"
        )

    @property
    def reference(self) -> str:
        return f"borgmatic:{self.file}#nas"

    @property
    def archives(self) -> list[str]:
        listed = run(self.borg, "list", "--short", self.repository, env={**os.environ, "BORG_PASSPHRASE": SECRET})
        return listed.splitlines()

    @property
    def log(self) -> list[str]:
        path = self.file.parent / "log"
        return path.read_text().splitlines() if path.exists() else []
