"""Where a restic repository is, how to show that without credentials, and the password to it.

Everything is looked for where restic itself looks, in its order: restic's documentation, "Preparing a new
repository" and "Environment variables".
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from blockferry.errors import PassphraseError, UsageError

OPTIONS_VARIABLE = "BLOCKFERRY_RESTIC_OPTIONS"
TAGS_VARIABLE = "BLOCKFERRY_RESTIC_TAGS"
_REMOTE = frozenset({"azure", "b2", "gs", "rclone", "rest", "s3", "sftp", "swift"})
_PATHS = ("RESTIC_PASSWORD_FILE", "RESTIC_CACHE_DIR", "RESTIC_CACERT", "RESTIC_TLS_CLIENT_CERT")
"""The variables of restic's that name a file or directory."""
_USER_INFO = re.compile(r"(?<=//)([^/\s@:]*):([^/\s]*)@")
"""`user:password@` in a URL; the password may hold an @ itself."""


@dataclasses.dataclass(frozen=True)
class Location:
    """A repository as restic is told of it. `where` may hold credentials and is never shown."""

    where: str = dataclasses.field(repr=False)
    reference: str
    """`where`, without credentials: the same for all who name this repository, in whatever way."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ, repr=False)
    """The environment that comes with it."""

    @classmethod
    def named(cls, where: str, environment: Mapping[str, str] = os.environ) -> Location:
        """Return the location that `where` names; if it is "", the one that the environment names.

        Raise UsageError if nothing names one.
        """
        found = where or environment.get("RESTIC_REPOSITORY", "")
        found = found or _first_of_file(environment.get("RESTIC_REPOSITORY_FILE", ""))
        if not found:
            raise UsageError(
                "restic: no repository is named",
                remedy="Write restic:PATH-OR-URL, or set RESTIC_REPOSITORY or RESTIC_REPOSITORY_FILE.",
            )
        absolute = _absolute(found)
        return cls(absolute, f"restic:{hide_passwords(absolute.removeprefix('local:'))}", environment)

    @property
    def directory(self) -> Path | None:
        """The local directory that the repository is, or None if it is reached some other way."""
        scheme, _, rest = self.where.partition(":")
        if scheme == "local":
            return Path(rest)
        return None if scheme in _REMOTE else Path(self.where)

    def hide(self, text: str) -> str:
        """Return a text of restic's without the credentials in it."""
        for _user, password in _USER_INFO.findall(self.where):
            if password:
                text = text.replace(password, "***")
        return hide_passwords(text)

    @property
    def options(self) -> list[str]:
        """The global options that every restic on this repository is to get; UsageError if they cannot be read."""
        return self._words(OPTIONS_VARIABLE)

    @property
    def tags(self) -> list[str]:
        """The tags that a snapshot gets beside our own; UsageError if they cannot be read."""
        return self._words(TAGS_VARIABLE)

    def _words(self, variable: str) -> list[str]:
        try:
            return shlex.split(self.variables.get(variable, ""))
        except ValueError as error:
            raise UsageError(f"{variable}: {error}", remedy="Quote its words as for a shell.") from None

    def environment(self) -> dict[str, str]:
        """Return the environment for a restic that works on this repository."""
        given = {name: value for name, value in self.variables.items() if name != "RESTIC_REPOSITORY_FILE"}
        given |= {name: os.path.abspath(given[name]) for name in _PATHS if given.get(name)}  # noqa: PTH100
        return given | {"RESTIC_REPOSITORY": self.where, "RESTIC_PROGRESS_FPS": "1"}


def _absolute(where: str) -> str:
    """Return a location as it is named from any directory: restic stores from within a mount."""
    scheme, _, rest = where.partition(":")
    if scheme == "local":
        return f"local:{os.path.abspath(rest)}"  # noqa: PTH100  # not resolved: what the user says stays recognizable
    return where if scheme in _REMOTE else os.path.abspath(where)  # noqa: PTH100


def hide_passwords(text: str) -> str:
    """Return a text with the password of every URL in it masked."""
    return _USER_INFO.sub(r"\1:***@", text)


def password(environment: Mapping[str, str]) -> str:
    """Return the repository's password; raise PassphraseError if none is set or it cannot be had.

    RESTIC_PASSWORD_COMMAND goes before RESTIC_PASSWORD_FILE and that before RESTIC_PASSWORD, as in restic.
    """
    command, file = environment.get("RESTIC_PASSWORD_COMMAND"), environment.get("RESTIC_PASSWORD_FILE")
    if command:
        found = _answer(command, environment)
    else:
        found = _content(file) if file else environment.get("RESTIC_PASSWORD", "")
    if not found:
        raise PassphraseError(
            "no password is set for the restic repository",
            remedy="Set RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD.",
        )
    return found


def _answer(command: str, environment: Mapping[str, str]) -> str:
    """Return what a password command prints."""
    try:
        done = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, env=environment
        )
        return done.stdout.decode("utf-8").strip()
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError) as error:
        # The command's own words may be secret: its exit code, or the reason it did not start, has to do.
        reason = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else "not started"
        raise PassphraseError(
            f"RESTIC_PASSWORD_COMMAND failed: {reason}", remedy="Run it by hand and see what it says."
        ) from None


def _content(file: str) -> str:
    """Return what a password file holds."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PassphraseError(
            f"{file}: the password cannot be read: {reason}", remedy="Check RESTIC_PASSWORD_FILE."
        ) from None


def _first_of_file(file: str) -> str:
    """Return the location that a repository file holds; "" if no file is named."""
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"{file}: the repository's location cannot be read", remedy="Check RESTIC_REPOSITORY_FILE."
        ) from None
