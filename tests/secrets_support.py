"""Looking for a secret wherever it must not be."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self


class Watch:
    """Looks at every process on this host, again and again.

    `seen` is the command lines with the secret in them, `environments` those of processes with it in their environment.
    """

    def __init__(self, secret: str) -> None:
        self.secret = secret.encode()
        self.seen: set[bytes] = set()
        self.environments: set[str] = set()
        self.looks = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._end.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                environment = b""
                with contextlib.suppress(OSError):
                    environment = (process / "environ").read_bytes()
                with contextlib.suppress(OSError):
                    # Afterwards: a process that becomes another one in between must not be taken for what it was.
                    line = (process / "cmdline").read_bytes()
                    if self.secret in line:
                        self.seen.add(line)
                    if self.secret in environment:
                        self.environments.add(line.replace(b"\0", b" ").decode())
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end.set()
        self._thread.join()


def kept(secret: str, *places: Path) -> Iterator[Path]:
    """Yield the files below some directories that hold the secret."""
    for place in places:
        for directory, _names, files in os.walk(place):
            for name in files:
                path = Path(directory, name)
                with contextlib.suppress(OSError):
                    if path.is_file() and secret.encode() in path.read_bytes():
                        yield path
