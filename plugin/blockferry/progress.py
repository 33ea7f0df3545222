"""Progress, as the roads report it and whoever runs them shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from blockferry.repository import Advance


class Progress(Protocol):
    """Somebody who wants to know how far a task is."""

    def task(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Begin a task of `total` bytes; the function given is called with the bytes done since its last call."""

    def count(self, name: str) -> contextlib.AbstractContextManager[Advance]:
        """Begin to count what nobody knows the number of; the function given is called with how many more there are."""


class Silent:
    """Nobody is watching."""

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Give a function that ignores what it is told."""
        del name, total
        yield lambda _count: None

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[Advance]:
        """Give a function that ignores what it is told."""
        del name
        yield lambda _count: None
