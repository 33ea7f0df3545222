"""What changed on a thin logical volume: the blocks that it no longer shares with a snapshot kept since the checkpoint.

A thin snapshot shares every block with its volume until one of them is written to or discarded; from then on the pool
maps them differently. `thin_delta` compares the two mappings in a snapshot of the pool's metadata, before which the
kernel commits what it holds in memory (process_reserve_metadata_snap_mesg, drivers/md/dm-thin.c): a block is mapped
before a write to it is acknowledged, so every such write is in it. The output is in blocks of the pool:

    <superblock data_block_size="128" ...>                  in sectors
      <diff left="THE SNAPSHOT" right="THE VOLUME">
        <same begin="16" length="34"/>
        <different .../> <left_only .../> <right_only .../>  written; discarded; written for the first time

`thin_delta` before 0.7.4 lost blocks. A thin device without LVM is not tracked: which of a pool's ids are free is known
only to whoever manages the pool.
"""

from __future__ import annotations

from collections.abc import Iterator

from blockferry.changed import devicemapper
from blockferry.changed.devicemapper import CannotTrackError, Elements
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.inuse import Numbers
from blockferry.volume import Volume

TRACKER = "thin"

_OLDEST = (0, 7, 4)


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Take a thin snapshot of a thin logical volume, to be kept, and not to be activated."""
    if named not in ("", TRACKER):
        return None
    return devicemapper.attempt(TRACKER, lambda: _begin(volume, snapshot), declined)


@hookimpl
def blockferry_changed_extents(volume: Volume, since: Checkpoint, declined: Declined) -> ChangedBlocks | None:
    """Return the blocks that volume and kept snapshot do not share."""
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
    if origin is None or not origin.pool:
        return None
    check_tool()
    return devicemapper.keep_snapshot(TRACKER, volume, origin, snapshot, "--setactivationskip", "y")


def _changed(volume: Volume, since: Checkpoint) -> ChangedBlocks:
    check_tool()
    origin = devicemapper.logical_volume(volume)
    if origin is None or not origin.pool:
        raise CannotTrackError("it is not a thin logical volume any more")
    kept = devicemapper.kept_snapshot(since, origin)
    if kept.pool != origin.pool or kept.size != volume.size:
        raise CannotTrackError(f"{kept.full_name} is of another thin pool or size")
    pool, metadata, block = _pool(origin.device, origin.thin_id)
    ids = ["--thin1", kept.thin_id, "--thin2", origin.thin_id]
    with devicemapper.metadata_snapshot(pool, metadata, "reserve_metadata_snap", "release_metadata_snap") as path:
        found = devicemapper.elements("thin_delta", "--metadata-snap", *ids, path)
        ranges = parse_delta(found, kept.thin_id, origin.thin_id, block)
        changed = devicemapper.extents(ranges, block, volume.size)
    return ChangedBlocks(changed, "thin snapshot kept since the checkpoint")


def parse_delta(found: Elements, left: str, right: str, block: int) -> Iterator[tuple[int, int]]:
    """Yield, as (begin, end) in blocks of `block` bytes, what thin_delta says differs between two thin devices.

    Raise CannotTrackError if it is not of these devices, or is anything that this does not know.
    """
    compared = 0
    for name, attributes in found:
        match name:
            case "superblock" if devicemapper.number(attributes, "data_block_size") * devicemapper.SECTOR == block:
                pass
            case "diff" if (attributes.get("left"), attributes.get("right")) == (left, right):
                compared += 1
            case "same" if compared:
                pass
            case "different" | "left_only" | "right_only" if compared:
                begin = devicemapper.number(attributes, "begin")
                yield begin, begin + devicemapper.number(attributes, "length")
            case _:
                raise CannotTrackError(f"thin_delta says {name} {attributes}, which is not known here")
    if compared != 1:
        raise CannotTrackError("thin_delta compared nothing")


def _pool(device: Numbers, thin_id: str) -> tuple[Numbers, Numbers, int]:
    """Return the pool of a thin device, the pool's metadata device, and the bytes of a block."""
    thin = devicemapper.table(device)
    if thin is None or thin.kind != "thin" or thin.fields[1:2] != [thin_id]:
        raise CannotTrackError("the kernel does not know it as the thin volume that LVM lists")
    number = devicemapper.parse_device(thin.fields[0])
    pool = devicemapper.table(number)
    if pool is None or pool.kind != "thin-pool" or len(pool.fields) < 3:
        raise CannotTrackError("its pool is none that the kernel knows")
    return number, devicemapper.parse_device(pool.fields[0]), int(pool.fields[2]) * devicemapper.SECTOR


def check_tool() -> None:
    """Raise CannotTrackError if there is no thin_delta, or one that loses blocks."""
    version = devicemapper.tool_version("thin_delta")
    if version < _OLDEST:
        raise CannotTrackError(f"thin_delta {'.'.join(map(str, version))} loses blocks: 0.7.4 or later is needed")
