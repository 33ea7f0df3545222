"""Log indexes of each kind, and what can be done to them from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from blockferry.cluster.index import PATIENCE
from cluster_support import PROGRAMS

KINDS = [*(PROGRAMS or ["redis-server"]), "sqlite"]
SOON = PATIENCE + 0.7
"""Seconds within which a call has ended, on a busy machine."""


@dataclasses.dataclass
class Place:
    """Where an index is, and what can be done to it from outside."""

    reference: str
    lose_memory: Callable[[], None]
    stopped: Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def held_by_another(file: Path) -> Iterator[None]:
    """Have a process that was stopped in the middle of a transaction."""
    script = (
        f"import sqlite3, time; c = sqlite3.connect({str(file)!r}); c.execute('BEGIN IMMEDIATE'); print(flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        yield
    finally:
        holder.kill()
        holder.communicate()


def numbers(*chunks: int) -> np.ndarray:
    return np.array(chunks, np.int64)


def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
