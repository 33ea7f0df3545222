"""A group in a repository: the table of its files, and the image that their content is in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.extents import ExtentSet
from blockferry.groups.table import FileTable
from blockferry.layers import Layer
from blockferry.remembered import Remembered
from blockferry.repository import Repository
from blockferry.snapshot import Record, Snapshot

_LARGEST_TABLE = 16 << 30


@dataclasses.dataclass(frozen=True)
class StoredGroup:
    """A group's snapshot, opened. Close it by closing its layer."""

    record: Record
    table: FileTable
    image: Layer

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Yield (where in the file, where in the image, length) of a file's content; the rest of it is zeros."""
        for extent in self.table.extents_of(row):
            yield int(extent["logical"]), int(extent["place"]), int(extent["length"])


def open_group(repository: Repository, snapshot: Snapshot) -> StoredGroup:
    """Open a group's snapshot; UsageError if it is one of a volume, DamagedSnapshotError if its table is not sound."""
    record, _map = repository.describe(snapshot)
    if record.group is None:
        raise UsageError(
            f"snapshot {snapshot.id} is of the volume {record.volume}, not of a group of files",
            remedy="`blockferry restore` brings volumes back.",
        )
    image = repository.open(snapshot)
    try:
        return StoredGroup(record, _read(image, record, f"{repository.reference}, snapshot {snapshot.id}"), image)
    except BaseException:
        image.close()
        raise


def refuse_group(record: Record) -> None:
    """Raise UsageError if a snapshot is of a group of files, which is no image of a volume."""
    if record.group is not None:
        raise UsageError(
            f"snapshot {record.snapshot} is of the group {record.volume}: it holds files, not a volume",
            remedy=f"`blockferry files {record.snapshot} --to DIR` brings them back.",
        )


def read_table(repository: Repository, snapshot: Snapshot, record: Record, remembered: Remembered) -> FileTable:
    """Return the table of a group's files: the one that this host remembers, else from the repository."""
    where = f"{repository.reference}, snapshot {snapshot.id}"
    stored = remembered.get(snapshot.id)
    if stored is not None:
        return FileTable.from_bytes(stored, record.size, where)
    with contextlib.closing(repository.open(snapshot)) as image:
        return _read(image, record, where)


def _read(image: Layer, record: Record, where: str) -> FileTable:
    """Read the table from a group's image."""
    place, length = table_place(record, where)
    stored = memoryview(bytearray(length))
    read = 0
    for offset, piece in image.stream(ExtentSet.from_pairs([(place, length)]), 16 << 20):
        stored[offset - place : offset - place + len(piece)] = piece
        read += len(piece)
    if read != length:
        raise DamagedSnapshotError(f"{where}: the table of its files is not there", remedy="Take another snapshot.")
    return FileTable.from_bytes(stored, record.size, where)


def table_place(record: Record, where: str) -> tuple[int, int]:
    """Return where in the image the table of files begins, and its length; DamagedSnapshotError if nowhere."""
    match (record.group or {}).get("table"):
        case [int(place), int(length)] if 0 <= place <= record.size and 0 < length <= min(
            _LARGEST_TABLE, record.size - place
        ):
            return place, length
    raise DamagedSnapshotError(
        f"{where}: the record does not say where the table of its files is", remedy="Take another snapshot."
    )
