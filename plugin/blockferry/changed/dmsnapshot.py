"""What changed on a thick logical volume: the chunks that an LVM snapshot, kept since the checkpoint, has copied out.

As lvmsync does, the snapshot's copy-on-write device is read: its table says what was copied out, in the format that
`exception_store` describes.

The kernel writes a pair, past the caches of the disk, before the write that caused it goes on to the volume: whatever
was written before the volume was made to hold still is in the table. A volume with a thick snapshot takes no discards.

Without LVM nobody would set such a snapshot up again after a reboot before the volume is written to: then there is no
tracker. Thin volumes are left to `thin`.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re

import numpy as np

from blockferry.changed import devicemapper
from blockferry.changed.devicemapper import CannotTrackError, LogicalVolume
from blockferry.exception_store import ExceptionStoreError, VoidStoreError, is_chunk, read_areas, read_header
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.inuse import device_name
from blockferry.volume import Volume

TRACKER = "dmsnapshot"

_CHUNK = 4096
"""Small chunks copy, and count as changed, the least."""
_SHARE = 2
"""A snapshot gets one in so many free extents: the next checkpoint, and the backup itself, need room beside it."""
_IN_FLIGHT = 2048
"""So many chunks may be on their way when a snapshot overflows (DEFAULT_COW_THRESHOLD, dm-snap.c).

An overflow is noted on the disk by an ordinary write, which a power cut can lose: then the table looks whole, but is as
good as full.
"""
_BATCH = 4096
"""Areas taken in before their chunks are joined into extents: a million chunks of 4 KiB, 8 MiB."""


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Take a snapshot of a thick logical volume, to be kept: only if asked for, because it slows every write down."""
    if named != TRACKER:
        return None
    return devicemapper.attempt(TRACKER, lambda: _begin(volume, snapshot), declined)


@hookimpl
def blockferry_changed_extents(volume: Volume, since: Checkpoint, declined: Declined) -> ChangedBlocks | None:
    """Return the chunks that the kept snapshot has copied out."""
    if since.tracker != TRACKER:
        return None
    return devicemapper.attempt(TRACKER, lambda: _changed(volume, since), declined)


@hookimpl
def blockferry_release_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove the kept snapshot."""
    if checkpoint.tracker == TRACKER:
        devicemapper.remove_snapshot(checkpoint)


def _begin(volume: Volume, snapshot: str) -> Checkpoint | None:
    origin = devicemapper.logical_volume(volume)
    if origin is None or origin.pool:
        return None
    if _room(origin) * origin.extent < 2 * _IN_FLIGHT * _CHUNK:
        raise CannotTrackError(f"the group {origin.group} has too few free extents for a snapshot that is kept")
    kind = ["--extents", str(_room(origin)), "--chunksize", f"{_CHUNK}b"]
    return devicemapper.keep_snapshot(TRACKER, volume, origin, snapshot, *kind)


def _room(origin: LogicalVolume) -> int:
    """Return the extents of a snapshot: all that can ever be needed, if there are so many."""
    extents = origin.size // origin.extent
    enough = extents + extents // 50 + 2  # the changes, and a table of 16 bytes a chunk of 4 KiB
    return min(enough, origin.free_extents // _SHARE)


def _changed(volume: Volume, since: Checkpoint) -> ChangedBlocks:
    origin = devicemapper.logical_volume(volume)
    if origin is None:
        raise CannotTrackError("it is not a logical volume any more")
    kept = devicemapper.kept_snapshot(since, origin)
    store, chunk = _exception_store(origin, kept)
    descriptor = os.open(device_name(store), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        changed = read_changed(descriptor, chunk, volume.size)
    finally:
        os.close(descriptor)
    _check_room(kept, chunk)
    return ChangedBlocks(changed, "LVM snapshot kept since the checkpoint")


def _exception_store(origin: LogicalVolume, kept: LogicalVolume) -> tuple[tuple[int, int], int]:
    """Return the copy-on-write device of a kept snapshot, and the bytes of a chunk.

    Raise CannotTrackError unless the kernel copies what is overwritten on this very volume to it.
    """
    if kept.device[0] < 0:
        raise CannotTrackError(f"{kept.full_name} is not active")
    volume, snapshot = devicemapper.table(origin.device), devicemapper.table(kept.device)
    if volume is None or snapshot is None or volume.kind != "snapshot-origin" or snapshot.kind != "snapshot":
        raise CannotTrackError(f"{origin.full_name} does not copy out to {kept.full_name}, or is being merged with it")
    if len(snapshot.fields) < 4 or volume.fields != snapshot.fields[:1] or volume.size != snapshot.size:
        raise CannotTrackError(f"{kept.full_name} was taken of another device or size")
    _, store, kind, sectors = snapshot.fields[:4]
    if kind not in ("P", "PO"):
        raise CannotTrackError(f"{kept.full_name} keeps its table in memory")
    return devicemapper.parse_device(store), int(sectors) * devicemapper.SECTOR


def _check_room(kept: LogicalVolume, chunk: int) -> None:
    """Raise CannotTrackError if a kept snapshot is void, or may have been without having noted it."""
    state = devicemapper.status(kept.device)
    match = re.fullmatch(r"(\d+)/(\d+)", state.fields[0]) if state and state.fields else None
    if not match:
        raise CannotTrackError(
            f"{kept.full_name} was full and is void: more was written to the volume than the group had room to note"
        )
    if (int(match[2]) - int(match[1])) * devicemapper.SECTOR < _IN_FLIGHT * chunk:
        raise CannotTrackError(f"{kept.full_name} is as good as full")


# -- the table of exceptions -------------------------------------------------------------------------------------------


def read_changed(descriptor: int, chunk: int, size: int) -> ExtentSet:
    """Return the bytes of a volume of `size` that an exception table says were copied out.

    `descriptor`, at its beginning, is the copy-on-write device of any persistent device-mapper snapshot, `chunk` the
    bytes of a chunk according to its table. Raise CannotTrackError if the table is not what the kernel writes.
    """
    if chunk < mmap.PAGESIZE or not is_chunk(chunk):
        raise CannotTrackError(f"a snapshot has chunks of {chunk} bytes")
    changed = ExtentSet.empty()
    try:
        if read_header(descriptor) != chunk:
            raise CannotTrackError("a snapshot's table has chunks of another size than the snapshot")
        areas = read_areas(descriptor, chunk, -(-size // chunk))
        while batch := list(itertools.islice(areas, _BATCH)):
            starts = np.concatenate([old for old, _new in batch]) * chunk
            changed = changed.union(ExtentSet.from_ranges(starts, np.minimum(starts + chunk, size)))
    except VoidStoreError:
        raise CannotTrackError(
            "the kept snapshot is void: more was written to the volume than it had room to note"
        ) from None
    except ExceptionStoreError as reason:
        raise CannotTrackError(f"a snapshot's table {reason}") from None
    return changed
