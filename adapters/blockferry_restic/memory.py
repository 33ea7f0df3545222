"""What this host remembers of the snapshots of a repository, so that the next backup need not decrypt it again.

restic derives its key anew for each process, which takes half a second: as long as copying a hundred megabytes. What a
difference starts at (the list, a base's record, block map and stamps) is small, was written by this host, and can never
change: a snapshot's id is the hash of its content. So it is kept in the state directory, private like that:

    restic/REPOSITORY/snapshots             the entries of `restic snapshots --json`, by id
    restic/REPOSITORY/ID.NAME               a file at the root of a snapshot, of the snapshots used last

Nothing here is the truth: whether a snapshot still exists is asked of the repository, and what is not remembered is
read from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from blockferry.remembered import Remembered

Entry = Mapping[str, Any]

_LIST = "snapshots"
_MOST_FILES = 100
"""The files of some thirty snapshots: more than the chain of a backup that goes by increments."""


class Memory:
    """The memory of one repository, named as the user names it."""

    def __init__(self, repository: str) -> None:
        self._files = Remembered("restic", hashlib.sha256(repository.encode()).hexdigest()[:16])

    def entries(self) -> dict[str, Entry | None]:
        """Return the list's entries by id, None for a snapshot that is not blockferry's."""
        try:
            return dict(json.loads(self._files.get(_LIST) or b"{}"))
        except (ValueError, TypeError):
            return {}

    def keep_entries(self, entries: Mapping[str, Entry | None]) -> None:
        """Remember these entries and no others, nor any file of another snapshot."""
        self._files.put(_LIST, json.dumps(entries).encode())
        self._files.keep(lambda name: name == _LIST or name.partition(".")[0] in entries, _MOST_FILES)

    def file(self, snapshot: str, name: str) -> bytes | None:
        """Return a file at the root of a snapshot, given by its full id; None if it is not remembered."""
        return self._files.get(f"{snapshot}.{name}")

    def keep(self, snapshot: str, name: str, content: bytes) -> None:
        """Remember a file at the root of a snapshot."""
        self._files.put(f"{snapshot}.{name}", content)
