"""Which borg is installed, and which of the three ways to work with it that leaves.

The `borg` command is `$BLOCKFERRY_BORG` or the one on PATH. If it is a Python script its first line names the
interpreter that has borg's modules: the kernel's `#!`, `env`, or the shell line that pip and setuptools write where
the path is too long for the kernel (distlib, `scripts.py`, `_build_shebang`).
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from blockferry.errors import ToolMissingError

COMMAND_VARIABLE = "BLOCKFERRY_BORG"
_FIRST_BETA = ("b", 23)
"""`borg create --map` came with 2.0.0b23."""
_PATIENCE = 60.0
"""Seconds for which `borg --version` may take, on a disk that is busy with something else."""


class Way(enum.Enum):
    """How to work with an installed borg."""

    WORKER = enum.auto()
    """1.2 or 1.4 with modules: a worker process under its interpreter."""
    STANDALONE = enum.auto()
    """1.2 or 1.4 without: `borg create` reads one sparse file through FUSE."""
    MAPPED = enum.auto()
    """2.0.0b23 and later: `borg create --map`."""


@dataclasses.dataclass(frozen=True)
class Installation:
    """An installed borg: the command, what it says its version is, and the interpreter (argv) that has its modules."""

    command: str
    version: str
    way: Way
    interpreter: tuple[str, ...] = ()


def find_installation(environment: Mapping[str, str] = os.environ) -> Installation:
    """Return the borg to use; raise ToolMissingError if there is none, or none of a series that we know."""
    named = environment.get(COMMAND_VARIABLE)
    command = shutil.which(named or "borg", path=environment.get("PATH"))
    if command is None:
        raise ToolMissingError(
            f"{named or 'borg'}: no such command",
            remedy=f"Install borg 1.2, 1.4 or 2.0.0b23, or name its command in {COMMAND_VARIABLE}.",
        )
    interpreter = interpreter_of(Path(command))
    version = _module_version(interpreter) if interpreter else None
    if version is not None:
        return Installation(command, version, _way(command, version, modules=True), interpreter)
    version = _command_version(command)
    return Installation(command, version, _way(command, version, modules=False))


def interpreter_of(script: Path) -> tuple[str, ...]:
    """Return the Python command line that a script's first lines name; empty if it is no Python script."""
    try:
        with script.open("rb") as opened:
            first, second = opened.readline(4096), opened.readline(4096)
    except OSError:
        return ()
    if not first.startswith(b"#!"):
        return ()
    words = shlex.split(first[2:].decode("utf-8", "replace"))
    if words == ["/bin/sh"] and second.startswith(b"'''exec' "):
        words = [word for word in shlex.split(second.decode("utf-8", "replace"))[1:] if word not in ("$0", "$@")]
    if words and Path(words[0]).name == "env":
        words = words[2:] if words[1:2] == ["-S"] else words[1:]
        words[:1] = [shutil.which(word) or word for word in words[:1]]
    if not words or not re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        return ()
    return tuple(words)


def _module_version(interpreter: tuple[str, ...]) -> str | None:
    """Return the version of the borg that an interpreter can import; None if it cannot."""
    try:
        done = _run([*interpreter, "-c", "import borg; print(borg.__version__)"])
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command_version(command: str) -> str:
    """Return the version that `borg --version` prints; raise ToolMissingError if it does not run."""
    try:
        done = _run([command, "--version"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissingError(f"{command}: does not run: {error}", remedy="Install borg anew.") from None
    match = re.search(r"\d+\.\d+\S*", done.stdout)
    if done.returncode or match is None:
        raise ToolMissingError(
            f"{command} --version: {(done.stderr or done.stdout).strip().splitlines()[-1:] or done.returncode}",
            remedy=f"Name a working borg in {COMMAND_VARIABLE}.",
        )
    return match[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Not in the current directory: Python would look there for modules first.
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_PATIENCE, check=False, cwd="/"
    )


def _way(command: str, version: str, *, modules: bool) -> Way:
    """Return how to work with a version; raise ToolMissingError for one that nobody tried."""
    match = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(?:(a|b|rc)(\d+))?", version)
    series = (int(match[1]), int(match[2])) if match else (0, 0)
    if series in ((1, 2), (1, 4)):
        return Way.WORKER if modules else Way.STANDALONE
    if match and series == (2, 0) and (match[3] or "rc", int(match[4] or 0)) >= _FIRST_BETA:
        return Way.MAPPED
    raise ToolMissingError(
        f"{command}: borg {version} is of a series that blockferry does not know",
        remedy=f"Use borg 1.2, 1.4 or 2.0.0b23 or later; {COMMAND_VARIABLE} can name another command.",
    )
