"""A directory as a repository that can be read: what an export showed (`blockferry.export`), as a stock tool gives it
back, extracted or mounted. `dir:PATH`.

Of each snapshot NAME the directory holds NAME.json, NAME.map, and NAME.img or NAME.segments/; and so it may those that
blockferry itself has stored, with their own names: blockferry.json, blockferry.map, and volume.img or volume/.

Nothing here is authenticated: whoever has put the files there has to see to that, as borg and restic do. What lies
there is untrusted; symbolic links are not followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from blockferry.blockmap import BlockMap
from blockferry.errors import DamagedSnapshotError, RepositoryError, UsageError
from blockferry.extents import Offsets
from blockferry.hookspecs import hookimpl
from blockferry.layers import BaseLayer, CutLayer, FileLayer, Layer
from blockferry.repository import Advance, Base, Repository
from blockferry.segment_files import SegmentsLayer
from blockferry.segments import VOLUME_DIRECTORY, check_complete, segment_number, unit_for
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot, Stored

PREFIX = "dir:"
RECORD, MAP, IMAGE, SEGMENTS = ".json", ".map", ".img", ".segments"
"""How the names of a volume's files end."""

_LARGEST_RECORD = 64 << 20
_LARGEST_MAP = 1 << 30
_DEEPEST = 16


@hookimpl
def blockferry_open_repository(reference: str) -> Repository | None:
    """Return the directory behind a `dir:` reference."""
    if not reference.startswith(PREFIX):
        return None
    path = Path(reference.removeprefix(PREFIX)).absolute()
    if not path.is_dir():
        raise UsageError(f"{reference}: no such directory", remedy="Write dir:PATH, where an export was extracted to.")
    return DirectoryRepository(f"{PREFIX}{path}", _with_records(path))


class DirectoryRepository:
    """Implements `blockferry.repository.Repository`, but for what would change it."""

    capabilities = frozenset({"parallel"})

    def __init__(self, reference: str, path: Path) -> None:
        self.reference = self.named = reference
        self._path = path

    def unit(self, size: int) -> int:
        """Return the size of the segments of an image of `size` bytes."""
        return unit_for(size)

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Refuse."""
        raise self._read_only()

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return what the records in the directory describe, oldest first."""
        del about_to_store
        found = [Snapshot.of(self._record(name), name) for name in _records(self._path)]
        return sorted(found, key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot."""
        record, path = self._record(snapshot.archive), self._path / _beside(snapshot.archive, MAP)
        try:
            block_map = BlockMap.from_bytes(_content(path, _LARGEST_MAP))
        except ValueError as error:
            raise _damaged(path, str(error)) from None
        if block_map.size != record.size or record.snapshot != snapshot.id:
            raise _damaged(path, "it does not belong to the record beside it")
        return record, block_map

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image, whichever way it lies there."""
        record, block_map = self.describe(snapshot)
        extents = block_map.extents(*record.stored_kinds)
        image = self._path / _beside(snapshot.archive, IMAGE)
        directory = self._path / _beside(snapshot.archive, SEGMENTS)
        if directory.is_dir() and not directory.is_symlink():
            numbers, lengths = _listed(directory, record.unit)
            stored = BlockMap.build(record.size, data=extents)
            check_complete(stored, record.unit, numbers, lengths, str(directory))
            return CutLayer(SegmentsLayer(directory, record.size, record.unit, numbers), extents)
        return CutLayer(_OpenImage(image, record.size), extents)

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Refuse."""
        raise self._read_only()

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _record(self, name: str) -> Record:
        path = self._path / _beside(name, RECORD)
        return Record.from_json(_content(path, _LARGEST_RECORD), str(path))

    def _read_only(self) -> RepositoryError:
        return RepositoryError(
            f"{self.reference}: can only be read", remedy="Store into a repository: borg:PATH-OR-URL, for example."
        )


class _OpenImage(BaseLayer):
    """An image file, open until it is closed."""

    def __init__(self, path: Path, size: int) -> None:
        descriptor = _opened(path)
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            raise _damaged(path, f"it has not the {size} bytes that its record says")
        self._file = FileLayer(descriptor, size, name=str(path))
        self._held = contextlib.ExitStack()
        self._held.callback(os.close, descriptor)
        self.size = size
        self.extents = self._file.extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.read_into(offset, buffer)

    def close(self) -> None:
        self._held.close()


def _with_records(path: Path) -> Path:
    """Return the first directory with records from here down, as long as there is one way: the path of an export."""
    place = path
    for _ in range(_DEEPEST):
        if any(True for _name in _records(place)):
            return place
        below = list(place.iterdir())
        if len(below) != 1 or below[0].is_symlink() or not below[0].is_dir():
            break
        place = below[0]
    raise UsageError(
        f"{PREFIX}{path}: holds no record of a volume (NAME.json)",
        remedy="Name the directory that was exported, as it is in the archive: .../var/lib/blockferry/export.",
    )


def _records(path: Path) -> Iterator[str]:
    """Yield the names that have both a record and a map in a directory."""
    names = {each.name for each in path.iterdir()}
    for name in sorted(names):
        if name.endswith(RECORD) and _beside(name.removesuffix(RECORD), MAP) in names:
            yield name.removesuffix(RECORD)


def _beside(name: str, ending: str) -> str:
    """Return what one of the files of a name is called."""
    own = {RECORD: RECORD_NAME, MAP: MAP_NAME, IMAGE: f"{VOLUME_DIRECTORY}.img", SEGMENTS: VOLUME_DIRECTORY}
    return own[ending] if name + RECORD == RECORD_NAME else name + ending


def _listed(directory: Path, unit: int) -> tuple[Offsets, Offsets]:
    """Return the numbers and the sizes of all segments in a directory."""
    numbers, lengths = [], []
    for below in directory.iterdir():
        if below.is_symlink() or not below.is_dir():
            raise _damaged(below, "it is no directory of segments")
        for path in below.iterdir():
            try:
                numbers.append(segment_number(below.name, path.name, unit))
            except ValueError as error:
                raise _damaged(below, str(error)) from None
            facts = path.lstat()
            lengths.append(facts.st_size if stat.S_ISREG(facts.st_mode) else -1)
    order = np.argsort(np.array(numbers, np.int64), kind="stable")
    return np.array(numbers, np.int64)[order], np.array(lengths, np.int64)[order]


def _content(path: Path, limit: int) -> bytes:
    """Return what a small file holds; DamagedSnapshotError if it is not there, or has more than `limit` bytes."""
    with open(_opened(path), "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise _damaged(path, error.strerror or "it cannot be read") from None
    if len(content) > limit:
        raise _damaged(path, f"it has more than {limit} bytes")
    return content


def _opened(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be opened") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _damaged(path, "it is no file")
    return descriptor


def _damaged(path: Path, what: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(f"{path}: {what}", remedy="Extract it anew, or take another archive.")
