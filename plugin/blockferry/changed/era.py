"""What changed on a dm-era device: the blocks that the kernel noted since the checkpoint's era.

A dm-era device counts eras and notes, for every block, the last era in which it was written; the note is on the disk
before the write goes on (process_deferred_bios, drivers/md/dm-era-target.c). The message `checkpoint` begins an era:
what is written after it is of that era or a later one, and what is written before it is in the backup whose checkpoint
it is. `take_metadata_snap` begins one too, so all that went before is in the metadata that `era_invalidate` reads; it
lists the blocks of the given era and later ones:

    <blocks> <range begin="3" end="5"/> <block block="10"/> </blocks>

Two things the kernel does not note. Of a discard it notes the first block only (era_map gets a discard whole, writes by
the block): after any discard, by the device's own count, the tracker declines. And nobody notes what is written while
the device does not exist, to the device below it: after a reboot, a power cut, or a new `dmsetup create`, it declines.
A device is the same while its number among all disks since the boot is (diskseq, Linux 5.15).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry.changed import devicemapper
from blockferry.changed.devicemapper import CannotTrackError, Elements, Target
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.inuse import Numbers, device_name
from blockferry.volume import Volume

TRACKER = "era"

_READS, _DISCARDED = 0, 13
"""Figures of a disk's `stat`: requests to read, and sectors discarded."""
_KEEP = 100
"""A checkpoint is a number and takes up no space."""


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Begin an era."""
    if named not in ("", TRACKER):
        return None
    return devicemapper.attempt(TRACKER, lambda: _begin(volume, snapshot), declined)


@hookimpl
def blockferry_changed_extents(volume: Volume, since: Checkpoint, declined: Declined) -> ChangedBlocks | None:
    """Return the blocks written in the checkpoint's era and all later ones."""
    if since.tracker != TRACKER:
        return None
    return devicemapper.attempt(TRACKER, lambda: _changed(volume, since), declined)


def _begin(volume: Volume, snapshot: str) -> Checkpoint | None:
    device, table = _era(volume)
    if device is None or table is None:
        return None
    devicemapper.message(device, "checkpoint")
    state = _incarnation(device, table) | {"era": _current(device)}
    devicemapper.flush(volume)
    return Checkpoint(TRACKER, snapshot, state, keep=_KEEP)


def _changed(volume: Volume, since: Checkpoint) -> ChangedBlocks:
    device, table = _era(volume)
    if device is None or table is None:
        raise CannotTrackError("it is not a dm-era device any more")
    then, now = since.state, _incarnation(device, table)
    if any(then.get(each) != now[each] for each in ("boot", "diskseq", "table")):
        raise CannotTrackError("the dm-era device was set up anew since: what was written meanwhile was not noted")
    if then.get("discarded") != now["discarded"]:
        raise CannotTrackError("there were discards since, which dm-era does not note")
    era = then.get("era")
    if not isinstance(era, int) or not 0 < era <= _current(device):
        raise CannotTrackError(f"era {era} has not been reached: the metadata were made anew")
    metadata, block = devicemapper.parse_device(table.fields[0]), int(table.fields[2]) * devicemapper.SECTOR
    return ChangedBlocks(_written_since(era, device, metadata, block, volume.size), "dm-era")


def _written_since(era: int, device: Numbers, metadata: Numbers, block: int, size: int) -> ExtentSet:
    with devicemapper.metadata_snapshot(device, metadata, "take_metadata_snap", "drop_metadata_snap") as path:
        found = devicemapper.elements("era_invalidate", "--metadata-snapshot", "--written-since", str(era), path)
        return devicemapper.extents(parse_blocks(found), block, size)


def parse_blocks(found: Elements) -> Iterator[tuple[int, int]]:
    """Yield, as (begin, end), the blocks that era_invalidate lists; raise CannotTrackError at anything else."""
    for name, attributes in found:
        match name:
            case "blocks":
                pass
            case "block":
                block = devicemapper.number(attributes, "block")
                yield block, block + 1
            case "range":
                yield devicemapper.number(attributes, "begin"), devicemapper.number(attributes, "end")
            case _:
                raise CannotTrackError(f"era_invalidate says {name}, which is not known here")


def _era(volume: Volume) -> tuple[Numbers | None, Target | None]:
    """Return the number and the table of the dm-era device that a volume is; None, None if it is none."""
    device = devicemapper.device_of(volume)
    table = devicemapper.table(device) if device else None
    return (device, table) if table and table.kind == "era" and len(table.fields) == 3 else (None, None)


def _current(device: Numbers) -> int:
    """Return the era that a device is in."""
    state = devicemapper.status(device)
    if state is None or len(state.fields) < 4:
        raise CannotTrackError("dm-era cannot tell its era (dmsetup status)")
    return int(state.fields[2])


def _incarnation(device: Numbers, table: Target) -> dict[str, Any]:
    """Return what stays the same as long as dm-era notes every write."""
    disk = Path(f"/sys/dev/block/{device[0]}:{device[1]}")
    sequence = disk / "diskseq"
    if not sequence.exists():
        raise CannotTrackError("Linux 5.15 or later is needed to tell whether the device was set up anew")
    before = _figures(disk)
    _read_a_page(device)
    if _figures(disk)[_READS] <= before[_READS]:  # queue/iostats does not tell: Linux 6.1 counts although it is 0
        raise CannotTrackError("the kernel does not count what is done to it, discards too: set its queue/iostats to 1")
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "diskseq": int(sequence.read_text()),
        "table": [table.size, *table.fields],
        "discarded": before[_DISCARDED],
    }


def _figures(disk: Path) -> list[int]:
    """Return what the kernel counts of a disk (Documentation/block/stat.rst)."""
    return [int(figure) for figure in (disk / "stat").read_text().split()]


def _read_a_page(device: Numbers) -> None:
    """Read from a device, past the page cache."""
    descriptor = os.open(device_name(device), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
    finally:
        os.close(descriptor)
