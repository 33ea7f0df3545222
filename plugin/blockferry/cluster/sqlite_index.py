"""The log index in a file: for one host, on which several processes use the volume, and for trying things out.

A file that two hosts see is no index for them: SQLite's memory of who writes is each host's own. Epochs are bound to
the boot of the kernel that opened them, so what another host opened counts as closed, as does what a crash of the
host may have taken with it. A crash of a process takes nothing.
"""

from __future__ import annotations

import sqlite3
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockferry.cluster.index import (
    PATIENCE,
    QUEUE_BYTES,
    LogIndex,
    checked_chunks,
    checked_name,
    from_text,
    not_open,
    to_text,
)
from blockferry.cluster.sqlite_file import File
from blockferry.errors import UsageError
from blockferry.extents import Offsets
from blockferry.hookspecs import hookimpl

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE keys (name TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL) STRICT, WITHOUT ROWID;
CREATE TABLE epochs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, open INTEGER NOT NULL, life TEXT NOT NULL
) STRICT;
CREATE TABLE hosts (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE claims (
    epoch INTEGER NOT NULL, chunk INTEGER NOT NULL, host INTEGER NOT NULL, PRIMARY KEY (epoch, chunk)
) STRICT, WITHOUT ROWID;
CREATE TABLE pieces (id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, piece BLOB NOT NULL) STRICT;
CREATE INDEX pieces_of_queue ON pieces (queue, id);
"""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LOOK_AGAIN = 0.02
"""Seconds between two looks at a queue that is empty."""
_AT_ONCE = 20_000
"""Claims that one transaction forgets: others wait meanwhile."""
_BELOW = "substr(name, 1, ?) = ?"


@hookimpl
def blockferry_log_index(reference: str) -> LogIndex | None:
    """Return the index in a file."""
    scheme, separator, rest = reference.partition("://")
    if scheme != "sqlite" or not separator:
        return None
    path = urllib.parse.unquote(rest)
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise UsageError(f"{reference}: not the path of a file", remedy="Write sqlite:///PATH, with three slashes.")
    return SqliteIndex(path)


class SqliteIndex:
    """A log index in a file. Implements `LogIndex`; an epoch lives as long as the host runs."""

    def __init__(self, path: str) -> None:
        """Open the file, made if it is not there, for its owner alone."""
        self._file = File(path, _SCHEMA, _SCHEMA_VERSION)
        self.reference = self._file.reference
        self._life = _BOOT.read_text().strip()

    def put(self, key: str, value: dict[str, Any], *, new: bool = False, lasts: float | None = None) -> bool:
        """Keep an object under a key."""
        now = time.time()
        row = (checked_name(key), to_text(value), None if lasts is None else now + lasts)
        with self._file.transaction() as connection:
            connection.execute("DELETE FROM keys WHERE expires <= ?", (now,))
            how = "OR IGNORE" if new else "OR REPLACE"
            return connection.execute(f"INSERT {how} INTO keys VALUES (?, ?, ?)", row).rowcount > 0  # noqa: S608

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key."""
        question = "SELECT value FROM keys WHERE name = ? AND (expires IS NULL OR expires > ?)"
        with self._file.connection() as connection:
            row = connection.execute(question, (checked_name(key), time.time())).fetchone()
        return from_text(self.reference, key, row[0]) if row else None

    def list(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return what is kept under the keys that begin with a prefix."""
        question = f"SELECT name, value FROM keys WHERE {_BELOW} AND (expires IS NULL OR expires > ?) ORDER BY name"  # noqa: S608
        with self._file.connection() as connection:
            rows = connection.execute(question, (*_below(prefix), time.time())).fetchall()
        return {name: from_text(self.reference, name, text) for name, text in rows}

    def remove(self, prefix: str) -> None:
        """Forget what begins with a prefix; of very many claims some are left to the next call."""
        deadline = time.monotonic() + PATIENCE / 2
        with self._file.transaction() as connection:
            connection.execute(f"DELETE FROM keys WHERE {_BELOW}", _below(prefix))  # noqa: S608
            connection.execute(f"DELETE FROM epochs WHERE {_BELOW}", _below(prefix))  # noqa: S608
            connection.execute("DELETE FROM pieces WHERE substr(queue, 1, ?) = ?", _below(prefix))
        orphans = "SELECT epoch, chunk FROM claims WHERE epoch NOT IN (SELECT id FROM epochs) LIMIT ?"
        while time.monotonic() < deadline:
            with self._file.transaction() as connection:
                doomed = connection.execute(orphans, (_AT_ONCE,)).fetchall()
                connection.executemany("DELETE FROM claims WHERE epoch = ? AND chunk = ?", doomed)
            if len(doomed) < _AT_ONCE:
                break

    def open_claims(self, epoch: str) -> None:
        """Let chunks be claimed."""
        with self._file.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO epochs (name, open, life) VALUES (?, 1, ?)", self._key(epoch))
            opened = connection.execute("UPDATE epochs SET open = 1 WHERE name = ? AND life = ?", self._key(epoch))
        if not opened.rowcount:
            raise not_open(self.reference, epoch)

    def close_claims(self, epoch: str) -> None:
        """Let no further chunk be claimed."""
        with self._file.transaction() as connection:
            connection.execute("UPDATE epochs SET open = 0 WHERE name = ? AND life = ?", self._key(epoch))

    def claim(self, epoch: str, host: str, chunks: Offsets) -> npt.NDArray[np.bool_]:
        """Claim chunks, in one transaction."""
        numbers = checked_chunks(chunks).tolist()
        with self._file.transaction() as connection:
            number = self._epoch(connection, epoch, "AND open")
            connection.execute("INSERT OR IGNORE INTO hosts (name) VALUES (?)", (checked_name(host),))
            (own,) = connection.execute("SELECT id FROM hosts WHERE name = ?", (host,)).fetchone()
            connection.executemany(
                "INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", ((number, chunk, own) for chunk in numbers)
            )
            first = connection.execute(
                "SELECT chunk FROM claims WHERE epoch = ? AND host = ? AND chunk IN (SELECT value FROM json_each(?))",
                (number, own, str(numbers)),
            ).fetchall()
        return np.isin(chunks, np.array(first, np.int64))

    def claimed(self, epoch: str, host: str) -> Offsets:
        """Return the chunks of which a host is the first."""
        question = (
            "SELECT chunk FROM claims WHERE epoch = ? AND host = (SELECT id FROM hosts WHERE name = ?) ORDER BY chunk"
        )
        with self._file.connection() as connection:
            rows = connection.execute(question, (self._epoch(connection, epoch), checked_name(host))).fetchall()
        return np.array(rows, np.int64).reshape(-1)

    def push(self, queue: str, piece: bytes) -> bool:
        """Add a piece to a queue."""
        checked_name(queue)
        with self._file.transaction() as connection:
            question = "SELECT coalesce(sum(length(piece)), 0) FROM pieces WHERE queue = ?"
            if connection.execute(question, (queue,)).fetchone()[0] >= QUEUE_BYTES:
                return False
            connection.execute("INSERT INTO pieces (queue, piece) VALUES (?, ?)", (queue, piece))
        return True

    def pop(self, queue: str, wait: float) -> bytes | None:
        """Take the first piece of a queue."""
        checked_name(queue)
        deadline = time.monotonic() + wait
        while True:
            piece = self._first_piece(queue)
            left = deadline - time.monotonic()
            if piece is not None or left <= 0:
                return piece
            time.sleep(min(left, _LOOK_AGAIN))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _key(self, epoch: str) -> tuple[str, str]:
        return checked_name(epoch), self._life

    def _epoch(self, connection: sqlite3.Connection, epoch: str, condition: str = "") -> int:
        """Return the number of an epoch of this life; EpochClosedError if there is none."""
        question = f"SELECT id FROM epochs WHERE name = ? AND life = ? {condition}"  # noqa: S608
        row = connection.execute(question, self._key(epoch)).fetchone()
        if row is None:
            raise not_open(self.reference, epoch)
        return int(row[0])

    def _first_piece(self, queue: str) -> bytes | None:
        with self._file.connection() as connection:  # which waits for nobody
            if connection.execute("SELECT 1 FROM pieces WHERE queue = ? LIMIT 1", (queue,)).fetchone() is None:
                return None
        first = "SELECT id, piece FROM pieces WHERE queue = ? ORDER BY id LIMIT 1"
        with self._file.transaction() as connection:
            row = connection.execute(first, (queue,)).fetchone()
            if row is None:
                return None
            connection.execute("DELETE FROM pieces WHERE id = ?", (row[0],))
        return bytes(row[1])


def _below(prefix: str) -> tuple[int, str]:
    """Return what stands for a prefix in a question, with its length in characters."""
    return len(checked_name(prefix)), prefix
