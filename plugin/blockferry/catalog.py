"""The catalog: an index of snapshots, and of what their backups cost, in SQLite.

The truth is in the repositories. `rebuild` makes the catalog again from them; only the figures of a run (bytes read,
seconds) are nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blockferry.errors import BlockferryError, DamagedSnapshotError
from blockferry.repository import Repository
from blockferry.sets import without_shares
from blockferry.snapshot import Record, Snapshot

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshots (
    repository TEXT NOT NULL,
    id TEXT NOT NULL,
    archive TEXT NOT NULL,
    volume TEXT NOT NULL,
    created TEXT NOT NULL,
    record TEXT NOT NULL,
    statistics TEXT NOT NULL,
    PRIMARY KEY (repository, id)
) STRICT
"""

_MOST_NAMED = 200
"""Snapshots that are offered where one is to be chosen."""


class Catalog:
    """The catalog of this host. One connection a command; SQLite's own locks keep commands apart."""

    def __init__(self, path: Path) -> None:
        """Open the catalog at `path`, made if it is not there."""
        self.path = path
        with self._named_errors(), contextlib.ExitStack() as opened:
            self.connection = opened.enter_context(contextlib.closing(sqlite3.connect(path, timeout=30)))
            version = self.connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in {0, _SCHEMA_VERSION}:
                raise BlockferryError(
                    f"{path}: written by another version of blockferry (schema {version})",
                    remedy="Move it away and run `blockferry catalog rebuild`.",
                )
            self.connection.execute(_SCHEMA)
            self.connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            self.connection.commit()
            opened.pop_all()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def add(self, repository: str, snapshot: Snapshot, record: Record, statistics: dict[str, Any]) -> None:
        """Add or replace one snapshot."""
        row = (
            repository,
            snapshot.id,
            snapshot.archive,
            snapshot.volume,
            snapshot.created,
            record.to_json().decode(),
            json.dumps(statistics, sort_keys=True),
        )
        with self._named_errors(), self.connection:
            self.connection.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def remove(self, repository: str, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots; those that are not there need no removing."""
        rows = [(repository, each.id) for each in snapshots]
        with self._named_errors(), self.connection:
            self.connection.executemany("DELETE FROM snapshots WHERE repository = ? AND id = ?", rows)

    def statistics(self, repository: str) -> dict[str, dict[str, Any]]:
        """Return, by snapshot id, the figures of the runs that stored them."""
        with self._named_errors():
            rows = self.connection.execute("SELECT id, statistics FROM snapshots WHERE repository = ?", (repository,))
            return {identifier: json.loads(statistics) for identifier, statistics in rows}

    def newest(self) -> list[tuple[str, str]]:
        """Return the ids of the newest snapshots of all repositories, and of each its volume and when it was made."""
        query = "SELECT id, volume, created FROM snapshots ORDER BY created DESC LIMIT ?"
        with self._named_errors():
            rows = self.connection.execute(query, (_MOST_NAMED,))
            return [(identifier, f"{volume}, {created[:16]}") for identifier, volume, created in rows]

    def rebuild(self, repository: Repository) -> tuple[int, list[str]]:
        """Make the repository's part of the catalog again; return how many snapshots, and what could not be read."""
        known = self.statistics(repository.reference)
        found, damaged = [], []
        for snapshot in without_shares(repository.snapshots()):
            try:
                found.append((snapshot, repository.describe(snapshot)[0]))
            except DamagedSnapshotError as error:
                damaged.append(error.message)
        with self._named_errors(), self.connection:
            self.connection.execute("DELETE FROM snapshots WHERE repository = ?", (repository.reference,))
        for snapshot, record in found:
            self.add(repository.reference, snapshot, record, known.get(snapshot.id, {}))
        return len(found), damaged

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, with the way out."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise BlockferryError(
                f"{self.path}: the catalog cannot be used: {error}",
                remedy="The repositories hold all that it does: move it away and run `blockferry catalog rebuild`.",
            ) from None
