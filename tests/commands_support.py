"""Running the `blockferry` command and the stock tools as a user does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


def _first(one: str, other: str) -> pytest.MarkDecorator:
    later = pytest.param(other, marks=pytest.mark.thorough)
    return pytest.mark.parametrize("depot", [one, later], indirect=True)


borg_first, restic_first = _first("borg", "restic"), _first("restic", "borg")
"""For what takes long: with one tool day by day, with both by `tox -e thorough`."""

PASSPHRASE = "correct horse battery staple"


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused(self, code: int, *words: str) -> Done:
        """Assert that the command ended with this code, one short message with these words, and no traceback."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        assert "internal error" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert 1 <= len(lines) <= 8, self.err
        for word in words:
            assert word.lower() in self.err.lower(), (word, self.err)
        return self


def command(*arguments: object) -> list[str]:
    """Return the argument list that runs `blockferry` in this interpreter's environment."""
    return [str(Path(sys.executable).with_name("blockferry")), *map(str, arguments)]


def blockferry(
    *arguments: object, env: dict[str, str] | None = None, timeout: float = 240, prefix: Sequence[str] = ()
) -> Done:
    """Run `blockferry`, as argument of the command `prefix` if there is one, and wait for it."""
    done = subprocess.run(
        [*prefix, *command(*arguments)],
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run(*arguments: object, **options: Any) -> str:
    """Run any command; an AssertionError with all that it printed if it fails."""
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Depot:
    """A real repository, and the stock tool on it."""

    tool: str
    path: Path
    env: dict[str, str]

    @property
    def reference(self) -> str:
        return f"{self.tool}:{self.path}"

    def ferry(self, *arguments: object, **env: str) -> Done:
        """Run `blockferry ... --repo THIS`."""
        return blockferry(*arguments, "--repo", self.reference, env=self.env | env)

    def stock(self, *arguments: object) -> str:
        """Run borg or restic itself; borg takes the repository from BORG_REPO."""
        where = {"borg": {"BORG_REPO": str(self.path)}, "restic": {"RESTIC_REPOSITORY": str(self.path)}}[self.tool]
        return run(self.tool, *arguments, env=os.environ | self.env | where)

    def archives(self) -> list[str]:
        """Return what the stock tool lists."""
        if self.tool == "borg":
            return [
                each["name"] for each in json.loads(self.stock("list", "--json", "--consider-checkpoints"))["archives"]
            ]
        return [each["id"] for each in json.loads(self.stock("snapshots", "--json"))]

    def check(self) -> None:
        """Have the stock tool read and check everything."""
        self.stock(*(["check", "--verify-data"] if self.tool == "borg" else ["check", "--read-data"]))


def new_depot(tool: str, path: Path) -> Depot:
    """Make an encrypted repository."""
    secret = "BORG_PASSPHRASE" if tool == "borg" else "RESTIC_PASSWORD"
    depot = Depot(tool, path, {secret: PASSPHRASE})
    depot.stock(*(["init", "--encryption=repokey-blake2"] if tool == "borg" else ["init"]))
    return depot


@contextlib.contextmanager
def locked(depot: Depot) -> Iterator[None]:
    """Hold the repository's exclusive lock by the stock tool itself."""
    env = os.environ | depot.env
    if depot.tool == "borg":
        holding = ["borg", "with-lock", str(depot.path), "sleep", "60"]
    else:
        # A check holds an exclusive lock, and reads this slowly for longer than the test lasts.
        ballast = depot.path.with_name("ballast")
        ballast.write_bytes(os.urandom(1 << 20))
        run("restic", "-r", depot.path, "backup", ballast, env=env)
        holding = ["restic", "-r", str(depot.path), "--limit-download=1", "check", "--read-data"]
    holder = subprocess.Popen(holding, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held = depot.path / {"borg": "lock.exclusive", "restic": "locks"}[depot.tool]
    try:
        while not (held.exists() and any(held.iterdir())):
            assert holder.poll() is None
            time.sleep(0.02)
        yield
    finally:
        holder.kill()
        holder.wait()
        depot.stock(*(["break-lock"] if depot.tool == "borg" else ["unlock"]))
