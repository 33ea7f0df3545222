"""The connections to an SQLite file that several processes and threads of one host share, within a bounded time.

Connections are kept for whoever comes next; never two threads on one. A file that took the place of the one that was
opened is seen before each use: whoever still wrote to the old one would not be seen by the others.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator

from blockferry.cluster.index import PATIENCE, closed
from blockferry.errors import LogIndexError

_REASONS = {
    sqlite3.SQLITE_BUSY: (
        f"did not answer within {PATIENCE:g} seconds: another process holds it",
        "See who has the file open, by `fuser -v`.",
    ),
    sqlite3.SQLITE_FULL: ("is full", "Make room on its filesystem, or remove what is left of earlier backups."),
    sqlite3.SQLITE_NOTADB: ("is not a log index", "Name a file that is not there yet."),
    sqlite3.SQLITE_CORRUPT: (
        "is damaged",
        "Remove the file, with -wal and -shm: it is of backups that run, no others.",
    ),
}


class File:
    """An SQLite file with a schema."""

    def __init__(self, path: str, schema: str, version: int) -> None:
        """Open the file; make it, for its owner alone, if it is not there. Raise LogIndexError if it is not ours."""
        self.reference = f"sqlite://{path}"
        self._path = path
        self._schema = schema
        self._version = version
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[int, int], sqlite3.Connection]] = []
        """Connections, each with the device and inode of its file."""
        self._closed = False
        with self.connection():
            pass

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for one question, or for a transaction; SQLite's errors become ours."""
        with self._named_errors():
            identity, connection = self._take()
            try:
                yield connection
            except sqlite3.Error:
                connection.close()
                raise
            except BaseException:
                self._give_back(identity, connection)
                raise
            self._give_back(identity, connection)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for what is done as a whole or not at all, while nobody else writes."""
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:  # SQLite itself ends one when the disk is full
                    connection.rollback()
                raise
            connection.commit()

    def close(self) -> None:
        """Close the connections, those in use when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _identity, connection in idle:
            connection.close()

    # -- connections ---------------------------------------------------------------------------------------------------

    def _take(self) -> tuple[tuple[int, int], sqlite3.Connection]:
        while True:
            with self._lock:
                if self._closed:
                    raise closed(self.reference)
                if not self._idle:
                    break
                identity, connection = self._idle.pop()
            if identity == self._identity():
                return identity, connection
            connection.close()
        return self._connected()

    def _give_back(self, identity: tuple[int, int], connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append((identity, connection))
                return
        connection.close()

    def _identity(self) -> tuple[int, int]:
        """Return which file is at the path now; (0, 0): none."""
        try:
            facts = os.stat(self._path)
        except FileNotFoundError:
            return 0, 0
        return facts.st_dev, facts.st_ino

    def _connected(self) -> tuple[tuple[int, int], sqlite3.Connection]:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # One that is there is only looked at: to close it would drop the locks of our other connections (fcntl).
        facts = os.lstat(self._path)
        if not stat.S_ISREG(facts.st_mode):
            raise self._failed("is not a file", "Name a file that is not there yet.")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            raise self._failed("can be read or written by others", f"chmod 600 {self._path}")
        # Whoever has a connection has it alone, for a while; isolation_level: transactions are ours to begin.
        connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return (facts.st_dev, facts.st_ino), connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")  # a crash of the host ends every epoch anyway
        if self._has_schema(connection):
            return
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        if not self._has_schema(connection):
            for statement in filter(str.strip, self._schema.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {self._version}")
        connection.commit()

    def _has_schema(self, connection: sqlite3.Connection) -> bool:
        """Tell whether the file is an index, not an empty file; LogIndexError if it is anything else."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == self._version:
            return True
        if version or connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise self._failed(f"is of another kind or version ({version})", "Name a file that is not there yet.")
        return False

    # -- errors --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what SQLite adds to the kind
            what, remedy = _REASONS.get(code, (f"cannot be used: {error}", "See to the file and its filesystem."))
            raise self._failed(what, remedy) from None
        except OSError as error:
            raise self._failed(
                f"cannot be opened: {error.strerror}", "Name a file in a directory that you may write to."
            ) from None

    def _failed(self, what: str, remedy: str) -> LogIndexError:
        return LogIndexError(f"{self.reference}: the log index {what}", remedy=remedy)
