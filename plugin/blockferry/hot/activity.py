"""What the disk's user does: hydration stands back while there is any, and goes first where it would read next."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

_ON = 4
"""Units that a read may be beyond the one before it, and go on from there: the kernel cuts reads, and mixes them up."""


class Activity:
    """Reads and writes of a disk, as they come. Used by several threads."""

    def __init__(self) -> None:
        self.latest = 0.0
        self.wanting = threading.Event()
        """Set while `take` has anything to tell."""
        self._lock = threading.Lock()
        self._read = -1 - _ON  # nothing goes on from no read
        self._missed = self._followed = -1
        self._fetching = 0
        self._fetched = 0.0

    def note(self) -> None:
        """Somebody uses the disk."""
        self.latest = time.monotonic()

    def reads_on(self, number: int) -> bool:
        """Somebody reads in a unit; tell whether he came there in sequence."""
        step, self._read = number - self._read, number
        return 0 < step <= _ON

    def will_follow(self, number: int) -> None:
        """What follows a unit is about to be read."""
        with self._lock:
            self._followed = number
            self.wanting.set()

    def missed(self, number: int) -> None:
        """Somebody reads a unit that has to be fetched."""
        with self._lock:
            self._missed = number
            self.wanting.set()

    def take(self) -> tuple[int, int]:
        """Return the latest units that were told of by `will_follow` and by `missed` since the last call, or -1."""
        with self._lock:
            told = self._followed, self._missed
            self._followed = self._missed = -1
            self.wanting.clear()
        return told

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Somebody waits for the repository, for the length of the context."""
        with self._lock:
            self._fetching += 1
        try:
            yield
        finally:
            with self._lock:
                self._fetching -= 1
                self._fetched = time.monotonic()

    def has_fetched(self, within: float) -> bool:
        """Tell whether somebody waits for the repository, or did so within the last seconds."""
        return self._fetching > 0 or time.monotonic() - self._fetched < within
