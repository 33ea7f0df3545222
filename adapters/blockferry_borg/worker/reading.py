"""Reading chunks of an archive without standing in the way of backups."""

from __future__ import annotations

import array
import contextlib
from typing import Any

from borg.archive import Archive
from borg.constants import zeros
from borg.helpers import Manifest

from blockferry_borg.worker.archives import ITEMS, ChunkEntries, Connection, DamagedError, chunk_lists, unit_of
from blockferry_borg.worker.channel import Channel
from blockferry_borg.worker.problems import description


def read(connection: Connection, channel: Channel, request: dict[str, Any]) -> None:
    """Answer reads of one archive until the parent closes it."""
    with contextlib.closing(Reader(connection, request["archive"], request["items"])) as reader:
        channel.send(unit=reader.unit, sizes={path: chunks.size for path, chunks in reader.lists.items()})
        wanted = channel.take()
        while "read" in wanted:
            try:
                reader.read_into(channel.slot(wanted["slot"]), wanted["item"], wanted["runs"])
            except Exception as error:  # told to whoever asked; the next read may fare better
                channel.send(read=wanted["read"], error=description(error))
            else:
                channel.send(read=wanted["read"])
            wanted = channel.take()
    channel.send(closed=True)


class ChunkList:
    """Which chunks an item is made of: 4 bytes a chunk, and 32 more for each that is not the chunk of zeros."""

    def __init__(self, unit: int, zero_id: bytes) -> None:
        self.unit = unit
        self.size = 0
        self.lost: set[int] = set()
        self._ids = bytearray(zero_id)
        self._places = array.array("I")

    def fill(self, entries: ChunkEntries) -> None:
        """Take the entries of a chunk list; all but the last must be of one size."""
        ids, places = self._ids, self._places
        zero_id = bytes(ids)
        for chunk in entries:
            if self.size % self.unit or chunk.size > self.unit:
                raise DamagedError(f"{entries.path} is not in chunks of {self.unit} bytes")
            self.size += chunk.size
            if chunk.id == zero_id:
                places.append(0)
            else:
                places.append(len(ids) >> 5)
                ids += chunk.id

    def note_lost(self, entries: ChunkEntries) -> None:
        """Compare with the list of what should be there, which borg keeps when it repairs an item."""
        for number, chunk in enumerate(entries):
            if number < len(self._places) and chunk.id != self.id(number):
                self.lost.add(number)

    def id(self, number: int) -> bytes:
        """Return the id of a chunk."""
        place = self._places[number] << 5
        return bytes(self._ids[place : place + 32])

    def length(self, number: int) -> int:
        """Return the bytes that a chunk holds."""
        return min(self.unit, self.size - number * self.unit)


class Reader:
    """Reads chunks, holding no lock.

    A repository that is opened without a lock while another process commits would take the new state for a crash and
    repair it. So it is opened, and made to load its index, while a shared lock keeps everybody from writing; after
    that it looks at segments alone. Compaction may take those away: then it is opened once more.
    """

    def __init__(self, connection: Connection, name: str, items: list[str]) -> None:
        self.connection = connection
        self.name = name
        self.lists: dict[str, ChunkList] = {}
        self._repository: Any = None
        self._open(items)

    def read_into(self, target: memoryview, path: str, runs: list[tuple[int, int]]) -> None:
        """Put the chunks of the runs, one after the other, into `target`; raise what borg raises if one is gone."""
        chunks = self.lists[path]
        numbers = [number for first, count in runs for number in range(first, first + count)]
        for number in numbers:
            if number in chunks.lost:
                raise DamagedError(f"archive {self.name}: the bytes at {number * self.unit} are lost, says borg check")
        try:
            self._fetch(target, chunks, numbers)
        except Exception:  # borg has many names for a segment that is gone; what is really lost fails again below
            self._open()
            self._fetch(target, chunks, numbers)

    def close(self) -> None:
        """Let go of the repository."""
        if self._repository is not None:
            self._repository.__exit__(None, None, None)
            self._repository = None

    def _open(self, items: list[str] | None = None) -> None:
        self.close()
        with self.connection.open() as locked:
            manifest, self._key = self.connection.manifest(locked)
            if items:
                self._load(Archive(locked, self._key, manifest, self.name), items)
            self._repository = self.connection.open(lock=False)
            self._repository.__enter__()
            self._repository.get(Manifest.MANIFEST_ID)

    def _load(self, archive: Any, items: list[str]) -> None:
        """Take the chunk lists of the items, and look no further than the last of them."""
        self.unit = unit_of(archive)
        zero_id = self._key.id_hash(memoryview(zeros)[: self.unit])
        last = max(ITEMS.index(path) for path in items)
        for entries in chunk_lists(archive):
            if ITEMS.index(entries.path) > last:
                break
            if entries.path not in items:
                continue
            if entries.field == "chunks":
                self.lists[entries.path] = ChunkList(self.unit, zero_id)
                self.lists[entries.path].fill(entries)
            else:
                self.lists[entries.path].note_lost(entries)

    def _fetch(self, target: memoryview, chunks: ChunkList, numbers: list[int]) -> None:
        """Fetch, authenticate and decompress chunks."""
        position = 0
        fetched = self._repository.get_many([chunks.id(number) for number in numbers])
        for number in numbers:
            plain = self._key.decrypt(chunks.id(number), next(fetched))
            if len(plain) != chunks.length(number):
                raise DamagedError(f"archive {self.name}: the chunk at {number * self.unit} is not of its size")
            target[position : position + len(plain)] = plain
            position += len(plain)
