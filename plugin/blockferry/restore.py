"""The read road: a snapshot's layer -> a target; and the same layer against a volume."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import Any

import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.chain import trace
from blockferry.errors import VerificationError, VolumeError
from blockferry.extents import ExtentSet
from blockferry.groups.stored import refuse_group
from blockferry.layers import Layer
from blockferry.progress import Progress
from blockferry.repository import Repository
from blockferry.snapshot import Record, Snapshot
from blockferry.target import Target, prepare
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_BATCH = 4 << 20
"""Bytes handled at a time: large enough for the disk, small enough to bound memory."""

_MOST_NAMED = 5
"""Differences that an error names before it only counts."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a restore did; sizes in bytes."""

    snapshot: str
    target: str
    bytes_volume: int
    bytes_read: int
    bytes_written: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures that `restore --json` prints."""
        return {"version": 1} | dataclasses.asdict(self) | {"seconds": round(self.seconds, 3)}


def restore(
    manager: pluggy.PluginManager,
    repository: Repository,
    snapshot: Snapshot,
    target_path: str,
    *,
    delta: bool,
    force: bool,
    progress: Progress,
) -> Restored:
    """Write a snapshot's image to a device or file; with `delta`, only the blocks that differ.

    Raise TargetError if the target is not fit for it, DamagedSnapshotError if the repository lacks any byte,
    UsageError if the snapshot is of a group of files.
    """
    began = time.monotonic()
    chain = trace(repository, snapshot)
    record, block_map = chain.newest.record, chain.newest.block_map
    refuse_group(record)
    wanted = block_map.extents(Kind.DATA, Kind.SAME)
    with (
        contextlib.closing(chain.open(repository)) as image,
        prepare(target_path, record.size, force=force, keep=delta) as target,
        progress.task("restore", wanted.total) as advance,
    ):
        written = 0
        for offset, piece in image.stream(wanted, _BATCH):
            if not delta or _differs(target, offset, piece):
                target.write(offset, piece)
                written += len(piece)
            advance(len(piece))
        # Where a filesystem said what is in use the rest is free and may hold anything; elsewhere zeros are content.
        target.zero(block_map.extents(Kind.ZERO), must=record.zeros_are_content)
        target.finish()
    restored = Restored(snapshot.id, target_path, record.size, wanted.total, written, time.monotonic() - began)
    manager.hook.blockferry_restore_finished(snapshot=snapshot, target=target_path, statistics=restored.as_json())
    return restored


def verify(repository: Repository, snapshot: Snapshot, against: Volume | None, progress: Progress) -> dict[str, Any]:
    """Read every stored byte of a snapshot, and compare it with a volume if one is given.

    Return the figures that `verify --json` prints. Raise DamagedSnapshotError if a byte cannot be had or is not what
    was stored, VerificationError if the volume differs; bytes that were free at the backup are not compared.
    """
    chain = trace(repository, snapshot)
    record, block_map = chain.newest.record, chain.newest.block_map
    if against is not None:
        refuse_group(record)
    wanted = block_map.extents(Kind.DATA, Kind.SAME)
    compared = ExtentSet.whole(record.size) if record.zeros_are_content else wanted
    with contextlib.closing(chain.open(repository)) as image:
        if against is None:
            with progress.task("verify", wanted.total) as advance:
                for _offset, piece in image.stream(wanted, _BATCH):
                    advance(len(piece))
        else:
            _compare(image, compared, against, record, progress)
    return {
        "version": 1,
        "snapshot": snapshot.id,
        "bytes_verified": wanted.total,
        "bytes_compared": compared.total if against else 0,
        "runs": len(block_map),
    }


def describe_map(block_map: BlockMap) -> dict[str, int]:
    """Return the bytes of each kind of run."""
    return {kind.name.lower(): block_map.extents(kind).total for kind in Kind}


def _differs(target: Target, offset: int, piece: memoryview) -> bool:
    """Tell whether the target holds anything else than `piece` at `offset`."""
    there = bytearray(len(piece))
    target.read_into(offset, memoryview(there))
    return there != piece


def _compare(image: Layer, extents: ExtentSet, against: Volume, record: Record, progress: Progress) -> None:
    """Compare the image with a volume; raise VerificationError that names the first differences."""
    if against.size < record.size:
        raise VolumeError(
            f"{against.path}: has {against.size} bytes, the snapshot {record.size}",
            remedy="Name the volume that the snapshot was made of, or one it was restored to.",
        )
    differences = []
    with against.open_data() as disk, progress.task("verify", extents.total) as advance:
        for offset, piece in image.stream(extents, _BATCH):
            there = bytearray(len(piece))
            disk.read_into(offset, memoryview(there))
            if there != piece:
                differences.append((offset, len(piece)))
            advance(len(piece))
    if differences:
        named = ", ".join(f"{offset}+{length}" for offset, length in differences[:_MOST_NAMED])
        more = f" and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        raise VerificationError(
            f"{against.path}: {len(differences)} pieces differ from snapshot {record.snapshot}, at {named}{more}",
            remedy="If the volume was written to since the backup this is expected; else trust neither blindly.",
        )
