"""A group of files, as its image would be in a repository, in a file of this host: what is shown of it is read there.

The image of a group says in its last bytes what became of the files while it was read, and so has to be read once, in
order. Whoever runs a job reads in any order, or not at all. So an export copies first: what has changed, over a copy of
the image that it goes on from, which takes no room where the filesystem shares blocks.

    spooled/GROUP/SNAPSHOT.img      the last one only
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pluggy

from blockferry import kernel
from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import BaseUnusableError, BlockferryError, RepositoryError
from blockferry.export.memory import Memory, Shown
from blockferry.export.view import View
from blockferry.groups.backup import GroupResult, back_up_groups
from blockferry.groups.definition import Group
from blockferry.layers import CutLayer, FileLayer, Layer
from blockferry.progress import Progress
from blockferry.repository import Advance, Base, plan
from blockferry.segments import Segments, new_stamp, segment_count, unit_for
from blockferry.snapshot import Record, Snapshot, Stored
from blockferry.state import locked, state_directory

log = logging.getLogger(__name__)


class Spool:
    """The images of one group. Implements `blockferry.repository.Repository`: one image is kept."""

    reference = named = Memory.reference
    capabilities = frozenset({"reuse"})

    def __init__(self, group: str) -> None:
        self._memory = Memory(group, kind="groups")
        self._directory = state_directory() / "spooled" / group
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def unit(self, size: int) -> int:
        """Return the size of the segments of an image of `size` bytes."""
        return unit_for(size)

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return what is remembered and has its image."""
        found = self._memory.snapshots(about_to_store=about_to_store)
        return [each for each in found if self._path(each.id).is_file()]

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of an image."""
        return self._memory.describe(snapshot)

    def open(self, snapshot: Snapshot) -> Layer:
        """Return an image."""
        shown = self.shown(snapshot)
        return _SpooledImage(self._path(snapshot.id), shown.block_map, shown.record.unit)

    def shown(self, snapshot: Snapshot) -> Shown:
        """Return what is to be shown of an image."""
        return self._memory.load(snapshot.id)

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Write an image, and keep no other."""
        planned = plan(block_map, record, bases)
        before = self._memory.load(bases[0].snapshot.id) if bases else None
        stamps = np.zeros(segment_count(record.size, record.unit), np.int64)
        if before and before.record.unit == record.unit:  # an image grows, and shrinks, at its end
            known = before.stamps[: stamps.size]
            stamps[: known.size] = known
        segments = Segments.plan(planned, record.unit, new_stamp(), stamps)
        unfinished = self._directory / f".{record.snapshot}.new"
        try:
            with unfinished.open("w+b") as file:
                if bases:
                    _copy(self._path(bases[0].snapshot.id), file.fileno())
                file.truncate(record.size)
                for start, length in planned.extents(Kind.DATA):
                    for offset in range(start, start + length, record.unit):
                        piece = memoryview(bytearray(min(record.unit, record.size - offset)))
                        source.read_into(offset, piece)
                        os.pwrite(file.fileno(), piece, offset)
                        advance(len(piece))
            unfinished.rename(self._path(record.snapshot))
        except OSError as error:
            raise BlockferryError(
                f"{unfinished}: writing failed: {error.strerror}",
                remedy="Make room there: as much as the files of the group take.",
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)
        self._memory.keep(Shown(record, block_map, segments.stamps, new_stamp()))
        for path in self._directory.iterdir():
            if path != self._path(record.snapshot):
                path.unlink()
        return Stored(Snapshot.of(record, record.snapshot), planned.extents(Kind.DATA).total)

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Refuse: what is kept is not a backup."""
        raise RepositoryError(f"{self.reference}: an export is not deleted but released")

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _path(self, snapshot: str) -> Path:
        return self._directory / f"{snapshot}.img"


@contextlib.contextmanager
def shown_group(manager: pluggy.PluginManager, group: Group, *, since: str, progress: Progress) -> Iterator[View]:
    """Copy what changed of a group, and give what is to be shown of it, for the length of the context.

    Raise NotNowError if a backup of the group runs, VolumeError if its root is no directory.
    """
    with locked(f"exported-{group.name}", f"{group.name}: is exported already"):
        spool = Spool(group.name)
        (result,) = back_up_groups(manager, [(group, spool)], since=since, progress=progress)
        _tell_problems(result)
        snapshot = result.result.snapshot
        with contextlib.closing(spool.open(snapshot)) as image:
            yield View(spool.shown(snapshot), image, lambda: None, problems=len(result.problems))


def _tell_problems(result: GroupResult) -> None:
    for path, reason in result.problems:
        log.warning("%s: %s", os.fsdecode(path), reason)


class _SpooledImage(CutLayer):
    """An image file, open until it is closed: all of each chunk that has anything, as it was stored."""

    def __init__(self, path: Path, block_map: BlockMap, unit: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BaseUnusableError(f"{path}: {error.strerror}") from None
        used = block_map.on_grid(unit).extents(Kind.DATA, Kind.SAME)
        super().__init__(FileLayer(self._descriptor, block_map.size, name=str(path)), used)

    def close(self) -> None:
        """Close the file, once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _copy(path: Path, target: int) -> None:
    """Make an open file a copy of another: by sharing its blocks, or else by copying them."""
    with path.open("rb") as source:
        try:
            kernel.clone(source.fileno(), target)
        except OSError:
            size, offset = os.fstat(source.fileno()).st_size, 0
            while offset < size:
                count = os.copy_file_range(source.fileno(), target, size - offset, offset, offset)
                if not count:
                    break
                offset += count
