"""Merging: a part and all that it lies on become one whole snapshot, which needs none of them any more.

It is the write road once more, with the chain in place of a volume: where the repository can take chunks over from
several snapshots nothing is read; else what the largest of them lacks is read out of the others. Of a set the chunks
that its log has something of are read: the log is written over the copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from blockferry.blockmap import BlockMap, Kind
from blockferry.chain import Chain, trace
from blockferry.difference import reusable
from blockferry.errors import BaseUnusableError, UsageError
from blockferry.layers import CutLayer, Layer, Stack
from blockferry.progress import Progress
from blockferry.repository import Base, Repository, plan
from blockferry.snapshot import Record, Snapshot, Stored, new_snapshot_id


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a merge did; sizes in bytes."""

    snapshot: Snapshot
    record: Record
    merged: list[str]
    bytes_read: int
    bytes_stored: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures that `merge --json` prints."""
        return {
            "version": 1,
            "snapshot": self.snapshot.id,
            "archive": self.snapshot.archive,
            "volume": self.record.volume,
            "merged": self.merged,
            "bytes_volume": self.record.size,
            "bytes_used": self.record.bytes_used,
            "bytes_read": self.bytes_read,
            "bytes_stored": self.bytes_stored,
            "seconds": round(self.seconds, 3),
        }


def merge(repository: Repository, named: Sequence[Snapshot], progress: Progress) -> Merged:
    """Store the newest of some snapshots, with all that it lies on, as one that is whole.

    Raise UsageError if one of the others is not among what it lies on, DamagedSnapshotError if one of those is gone or
    does not belong there.
    """
    began = time.monotonic()
    snapshots = repository.snapshots()
    places = {each.id: number for number, each in enumerate(snapshots)}
    newest = max(named, key=lambda each: places[each.id])
    chain = trace(repository, newest, snapshots)
    _check_named(chain, named)
    used = chain.newest.block_map.extents(Kind.DATA, Kind.SAME)
    size = chain.newest.record.size
    merged = [link.snapshot.id for link in reversed(chain.states)]
    record = dataclasses.replace(
        chain.newest.record,
        snapshot=new_snapshot_id(),
        tier_reason=f"merged from {', '.join(merged)}",
        base=merged[0],
        part=False,
        shares=None,
        state_of=chain.newest.record.state_of or newest.id,
    )
    block_map, bases = reusable(chain, BlockMap.build(size, data=used.difference(used), same=used), used, repository)
    try:
        stored, read = _store(repository, chain, block_map, bases, record, progress)
    except BaseUnusableError:
        stored, read = _store(repository, chain, BlockMap.build(size, data=used), [], record, progress)
    return Merged(stored.snapshot, record, merged, read, stored.bytes_stored, time.monotonic() - began)


def apply_log(repository: Repository, snapshot: Snapshot, progress: Progress) -> Merged:
    """Store a set as one whole snapshot: its copy of the volume with its log written over it.

    Raise UsageError if it is no set, DamagedSnapshotError if the log does not belong to the copy.
    """
    if not snapshot.closing:
        raise UsageError(
            f"snapshot {snapshot.id} is no set: no log belongs to it",
            remedy="`blockferry merge` makes one whole snapshot of a part and what it lies on.",
        )
    return merge(repository, [snapshot], progress)


def _store(
    repository: Repository, chain: Chain, block_map: BlockMap, bases: Sequence[Base], record: Record, progress: Progress
) -> tuple[Stored, int]:
    """Store the state of a chain; return also the bytes of it that had to be read."""
    work = plan(block_map, record, bases).extents(Kind.DATA).total
    with _source(repository, chain, block_map) as source, progress.task("merge", work) as advance:
        return repository.store(source, block_map, record, bases=bases, advance=advance), work


@contextlib.contextmanager
def _source(repository: Repository, chain: Chain, block_map: BlockMap) -> Iterator[Layer]:
    """Give the state of a chain as a layer; nothing is opened if nothing of it is to be read."""
    if not block_map.extents(Kind.DATA):
        yield Stack([], block_map.size)
        return
    with contextlib.closing(chain.open(repository)) as image:
        yield CutLayer(image, block_map.extents(Kind.DATA, Kind.SAME))


def _check_named(chain: Chain, named: Sequence[Snapshot]) -> None:
    """Raise UsageError unless there is something to merge, and all that was named is part of it."""
    newest, members = chain.newest.snapshot, {link.snapshot.id for link in chain.states}
    strangers = [each.id for each in named if each.id not in members]
    if strangers:
        raise UsageError(
            f"snapshot {newest.id} does not lie on {', '.join(strangers)}",
            remedy=f"It lies on: {', '.join(sorted(members - {newest.id})) or 'nothing, it is whole'}.",
        )
    if not chain.newest.record.part:
        raise UsageError(f"snapshot {newest.id} is whole already", remedy="Name a part: `blockferry snapshots` shows.")
