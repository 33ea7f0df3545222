"""Where a Redis is, as whom to log in, and with what password; how to show the first without the others."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from blockferry.errors import LogIndexError, UsageError

_TLS_FILES = ("ca", "cert", "key")
_FORMS = "Write redis://HOST:PORT/DB, rediss://HOST:PORT/DB?ca=FILE&cert=FILE&key=FILE or redis+unix:///PATH?db=DB."


@dataclasses.dataclass(frozen=True)
class Address:
    """A database of a Redis server: at a host and port, with or without TLS, or else at the path of a socket."""

    host: str = ""
    port: int = 6379
    path: str = ""
    database: int = 0
    user: str = ""
    tls: bool = False
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """For TLS: the authority (`ca`; none: the system's), our own certificate (`cert`) and its key (`key`)."""

    @property
    def reference(self) -> str:
        """The address as one writes it, the same on all hosts: without the user and the files."""
        if self.path:
            return f"redis+unix://{self.path}" + (f"?db={self.database}" if self.database else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.database}"


def parse(reference: str) -> Address | None:
    """Return the address that a reference names, None if it is none of a Redis; UsageError if it is wrong."""
    scheme, separator, rest = reference.partition("://")
    if not separator or scheme not in {"redis", "rediss", "redis+unix"}:
        return None
    if ":" in rest.split("/", 1)[0].rpartition("@")[0]:
        raise UsageError(
            f"{scheme}://***@{rest.rpartition('@')[2]}: a password does not belong into the address of an index",
            remedy="Set BLOCKFERRY_INDEX_PASSWORD_COMMAND or BLOCKFERRY_INDEX_PASSWORD; a user name may stay.",
        )
    shown = f"{scheme}://{rest.rpartition('@')[2]}"
    try:
        parts = urllib.parse.urlsplit(reference)
        options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        database = options.pop("db", "0") if scheme == "redis+unix" else parts.path.strip("/") or "0"
        address = Address(
            host=parts.hostname or "",
            port=parts.port or 6379,
            path=urllib.parse.unquote(parts.path) if scheme == "redis+unix" else "",
            database=int(database),
            user=urllib.parse.unquote(parts.username or ""),
            tls=scheme == "rediss",
            files={name: options.pop(name) for name in _TLS_FILES if name in options and scheme == "rediss"},
        )
    except ValueError:
        raise UsageError(f"{shown}: not the address of a Redis server", remedy=_FORMS) from None
    if options or bool(address.host) == bool(address.path) or address.path == "/" or address.database < 0:
        raise UsageError(f"{shown}: not the address of a Redis server", remedy=_FORMS)
    _check_files(shown, address)
    return address


def _check_files(shown: str, address: Address) -> None:
    if ("cert" in address.files) != ("key" in address.files):
        raise UsageError(f"{shown}: a certificate and its key belong together", remedy="Give both cert= and key=.")
    for file in address.files.values():
        try:
            Path(file).open("rb").close()
        except OSError as error:
            raise UsageError(
                f"{file}: cannot be read: {error.strerror}", remedy="Name a readable file in ca=, cert= and key=."
            ) from None


def password() -> str:
    """Return the password to the index, "" if none is set; LogIndexError if it cannot be had.

    BLOCKFERRY_INDEX_PASSWORD_COMMAND goes before BLOCKFERRY_INDEX_PASSWORD, as with restic's variables.
    """
    command = os.environ.get("BLOCKFERRY_INDEX_PASSWORD_COMMAND")
    if not command:
        return os.environ.get("BLOCKFERRY_INDEX_PASSWORD", "")
    try:
        done = subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode("utf-8").strip()
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError) as error:
        # The command's own words may be secret: its exit code, or the reason it did not start, has to do.
        reason = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else "not started"
        raise LogIndexError(
            f"BLOCKFERRY_INDEX_PASSWORD_COMMAND failed: {reason}", remedy="Run it by hand and see what it says."
        ) from None
