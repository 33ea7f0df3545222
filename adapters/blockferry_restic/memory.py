"""What this host remembers of the snapshots of a repository, so that the next backup need not decrypt it again.

restic derives its key anew for each process, which takes half a second: as long as copying a hundred megabytes. What a
difference starts at (the list, a base's record, block map and stamps) is small, was written by this host, and can never
change: a snapshot's id is the hash of its content. So it is kept in the state directory, private like that:

    restic/REPOSITORY/snapshots             the entries of `restic snapshots --json`, by id
    restic/REPOSITORY/ID.NAME               a file at the root of a snapshot, of the snapshots used last

Each file begins with the SHA-256 of the rest: one that a power cut cut off is as good as none. Nothing here is the
truth: whether a snapshot still exists is asked of the repository, what is not remembered is read from there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blockferry.errors import BlockferryError
from blockferry.state import state_directory

Entry = Mapping[str, Any]

_CANNOT = (OSError, BlockferryError)
"""What a state directory that is not to be had, or is full or read-only, is told by."""
_LIST = "snapshots"
_MOST_FILES = 100
"""The files of some thirty snapshots: more than the chain of a backup that goes by increments."""


class Memory:
    """The memory of one repository, named as the user names it. What cannot be kept is forgotten, without an error."""

    def __init__(self, repository: str) -> None:
        self._name = hashlib.sha256(repository.encode()).hexdigest()[:16]

    @functools.cached_property
    def _directory(self) -> Path:
        return state_directory() / "restic" / self._name

    def entries(self) -> dict[str, Entry | None]:
        """Return the list's entries by id, None for a snapshot that is not blockferry's."""
        try:
            return dict(json.loads(self._read(_LIST) or b"{}"))
        except (ValueError, TypeError):
            return {}

    def keep_entries(self, entries: Mapping[str, Entry | None]) -> None:
        """Remember these entries and no others, nor any file of another snapshot."""
        self._write(_LIST, json.dumps(entries).encode())
        self._forget(entries)

    def file(self, snapshot: str, name: str) -> bytes | None:
        """Return a file at the root of a snapshot, given by its full id; None if it is not remembered."""
        return self._read(f"{snapshot}.{name}")

    def keep(self, snapshot: str, name: str, content: bytes) -> None:
        """Remember a file at the root of a snapshot."""
        self._write(f"{snapshot}.{name}", content)

    def _read(self, name: str) -> bytes | None:
        try:
            path = self._directory / name
            content = path.read_bytes()
            os.utime(path)
        except _CANNOT:
            return None
        return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None

    def _write(self, name: str, content: bytes) -> None:
        with contextlib.suppress(*_CANNOT):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = self._directory / f".{os.getpid()}.{name}"
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            unfinished.rename(self._directory / name)

    def _forget(self, snapshots: Collection[str]) -> None:
        """Remove the files of all other snapshots, and the oldest of what is too much."""
        with contextlib.suppress(*_CANNOT):
            files = [path for path in self._directory.iterdir() if path.name != _LIST]
            files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            known = [path for path in files if path.name.partition(".")[0] in snapshots]
            for path in {*files} - {*known[:_MOST_FILES]}:
                path.unlink(missing_ok=True)
