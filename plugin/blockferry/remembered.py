"""Files in the state directory that spare asking for what cannot have changed. Losing one costs time, never data.

Each begins with the SHA-256 of the rest: one that a power cut cut off is as good as none. What cannot be kept, because
the state directory is not to be had, full or read-only, is forgotten without an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from blockferry.errors import BlockferryError
from blockferry.state import state_directory

_CANNOT = (OSError, BlockferryError)
_DIGEST = hashlib.sha256().digest_size


class Remembered:
    """The files of one directory, for its owner alone, each used again soon or not at all."""

    def __init__(self, *names: str) -> None:
        """Keep them in the directory of those names in the state directory."""
        self._names = names

    @functools.cached_property
    def _directory(self) -> Path:
        return state_directory().joinpath(*self._names)

    def get(self, name: str) -> bytes | None:
        """Return what a file holds; None if it is not there, or not sound."""
        try:
            path = self._directory / name
            with path.open("rb") as file:
                digest, content = file.read(_DIGEST), file.read()
            os.utime(path)
        except _CANNOT:
            return None
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, name: str, content: bytes | bytearray) -> None:
        """Write a file, whole or not at all."""
        with contextlib.suppress(*_CANNOT):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = self._directory / f".{os.getpid()}.{name}"
            with unfinished.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            unfinished.rename(self._directory / name)

    def names(self) -> list[str]:
        """Return the names of the files that are there, sound or not."""
        try:
            return sorted(path.name for path in self._directory.iterdir() if not path.name.startswith("."))
        except _CANNOT:
            return []

    def keep(self, wanted: Callable[[str], bool], most: int) -> None:
        """Remove every file whose name is not wanted, and of the others all but those used last."""
        with contextlib.suppress(*_CANNOT):
            files = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            kept = [path for path in files if wanted(path.name)][:most]
            for path in {*files} - {*kept}:
                path.unlink(missing_ok=True)
