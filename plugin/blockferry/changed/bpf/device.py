"""A block device as a tracker has to know it: where its writes show up, and whether it is still the same.

The kernel announces each request to a device, a "bio", by the tracepoint `block:block_bio_queue` when it is queued, and
by `block:block_bio_remap` when a driver below another one gets it without its being queued again (block/blk-core.c,
include/trace/events/block.h of Linux). Their `dev` is the whole disk even where the writer named a partition (`bio_dev`
in include/linux/bio.h, before and since Linux 5.12 made the bio itself point to the partition), and their `sector`
counts from the disk's beginning: a partition's request is moved (blk_partition_remap, which `block_bio_remap`
announces) before it is queued. So all writes to a disk come under its number, and those to a partition are the disk's
that touch it, whichever partitions come and go meanwhile.

What is seen: writes by filesystems, swap, the page cache, direct I/O, io_uring, discards, zeroing; from a device-mapper
device above as well, for that sends requests of its own. What is not: commands past the block layer (SG_IO, NVMe
passthrough), writes by another host, writes into the file or device behind a loop device, memory that is mapped (DAX),
and what the md and bcache drivers do with the devices below them. Where the kernel can tell, such a device is refused.

A device-mapper device gets new content without a write if its table is replaced: its table is part of `Device`. An LVM
snapshot wraps the table of its origin for as long as it exists; what is wrapped is what counts (`snapshot-origin`).
Merging a snapshot back changes the content of the origin while its table says `snapshot-merge`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import stat
import subprocess
from pathlib import Path

from blockferry.errors import VolumeError
from blockferry.programs import find

Numbers = tuple[int, int]
"""(major, minor) of a block device."""

_SECTOR = 512
"""The unit of sysfs and of bios, whatever the device's own."""
_NOT_BY_BIO = re.compile(r"(ram|zram|pmem|ndblk)\d")
"""Drivers that pages could be given to one by one, past the tracepoints, until Linux 6.3 (`rw_page`)."""
_NETLINK_KOBJECT_UEVENT = 15
_PREEMPTION = Path("/sys/kernel/debug/sched/preempt")


@dataclasses.dataclass(frozen=True)
class Device:
    """What must not change while a device is tracked. `start` and `size` in bytes, `start` on its disk."""

    numbers: Numbers
    disk: Numbers
    start: int
    size: int
    sequence: str
    """The kernel's number of this disk with this medium, never used twice between two boots (`diskseq`)."""
    mapping: str
    """What of another device or file it shows: a device-mapper table, a loop device's offset; else ""."""

    @classmethod
    def examine(cls, numbers: Numbers) -> Device:
        """Look at a device; raise VolumeError if it is not there, or is one whose writes could not all be seen."""
        try:
            entry = _sysfs(numbers)
            disk = entry.parent if (entry / "partition").exists() else entry
            sequence = (disk / "diskseq").read_text().strip() if (disk / "diskseq").exists() else ""
            members = [disk, *(found.parent for found in disk.glob("*/partition"))]
            _refuse(entry.name, _why_not(disk, members, sequence))
            return cls(
                numbers=numbers,
                disk=_read_numbers(disk),
                start=int((entry / "start").read_text()) * _SECTOR if entry != disk else 0,
                size=int((entry / "size").read_text()) * _SECTOR,
                sequence=sequence,
                mapping=_mapping(disk),
            )
        except (OSError, ValueError) as error:
            raise VolumeError(
                f"device {numbers[0]}:{numbers[1]}: cannot be looked at: {error}", remedy="Is it attached?"
            ) from None

    def difference(self, now: Device) -> str:
        """Return what of the device is not what it was, "" if all is."""
        if self.sequence != now.sequence:
            return "the device was detached, replaced or attached to something else"
        if (self.start, self.size) != (now.start, now.size):
            return "the device changed its size or place"
        return "" if self == now else "the device was mapped to something else"


def uevents() -> socket.socket:
    """Return a socket on which the kernel says whenever a device comes, goes or changes (lib/kobject_uevent.c)."""
    said = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT)
    said.bind((0, 1))
    return said


def numbers_of(path: str) -> Numbers:
    """Return the numbers of the block device at a path; raise VolumeError if that is no block device."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise VolumeError(f"{path}: {error.strerror}", remedy="Check the path; is the device attached?") from None
    if not stat.S_ISBLK(facts.st_mode):
        raise VolumeError(
            f"{path}: only block devices can be tracked",
            remedy="Attach an image file to a loop device and write to that alone; or keep it on XFS or btrfs, where "
            "changed blocks are found without a tracker.",
        )
    return os.major(facts.st_rdev), os.minor(facts.st_rdev)


def losses_are_counted() -> bool:
    """Tell whether this kernel counts the events that it withheld from a tracepoint's program, or withholds none.

    The kernel does not run such a program while another one, or a call on one's map, is at work on the same CPU
    (trace_call_bpf). Since Linux 6.7 it counts that; before, it can only happen where it preempts itself.
    """
    system = os.uname()
    version = re.match(r"(\d+)\.(\d+)", system.release)
    if version and (int(version[1]), int(version[2])) >= (6, 7):
        return True
    words = system.version.split()
    if "PREEMPT_DYNAMIC" not in words:
        return not any(word.startswith("PREEMPT") for word in words)
    try:
        return "(full)" not in _PREEMPTION.read_text()
    except OSError:
        return False


def _why_not(disk: Path, members: list[Path], sequence: str) -> tuple[str, str]:
    """Return why writes to a disk would not all be seen, and what to do; two empty strings if they are."""
    above = sorted(holder.name for each in members for holder in (each / "holders").glob("*"))
    strange = [name for name in above if not name.startswith("dm-")]
    if strange:
        return f"it is a part of {strange[0]}, whose writes to it are not seen", f"Track /dev/{strange[0]} instead."
    if _NOT_BY_BIO.match(disk.name) or _setting(disk, "dax", "0") != "0":
        return "it is memory, which can be written to past the kernel's block layer", ""
    if _setting(disk, "zoned", "none") != "none":
        return "it is zoned: where its data is written is not seen", ""
    if not sequence:
        return "this kernel cannot tell one attached device from the next (diskseq)", "Use Linux 5.15 or later."
    return "", ""


def _refuse(name: str, reason: tuple[str, str]) -> None:
    why, remedy = reason
    if why:
        raise VolumeError(f"/dev/{name}: cannot be tracked: {why}", remedy=remedy)


def _mapping(disk: Path) -> str:
    """Return what a loop or device-mapper device shows; raise VolumeError while a snapshot is merged back into it."""
    offset = disk / "loop" / "offset"
    if offset.exists():
        return offset.read_text().strip()
    return _table(_read_numbers(disk)) if (disk / "dm").exists() else ""


def _table(numbers: Numbers) -> str:
    command = [find("dmsetup"), "table", "--major", str(numbers[0]), "--minor", str(numbers[1])]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"}
    )
    table = done.stdout.strip()
    if done.returncode or not table:
        raise VolumeError(
            f"device {numbers[0]}:{numbers[1]}: dmsetup does not say what it is made of: {done.stderr.strip()}",
            remedy="Is it active? `dmsetup table` lists what is.",
        )
    if "snapshot-merge" in table.split():
        raise VolumeError(
            f"device {numbers[0]}:{numbers[1]}: a snapshot is being merged back into it",
            remedy="Wait until it is merged (`lvs -a`).",
        )
    wrapped = re.fullmatch(r"0 \d+ snapshot-origin (\d+):(\d+)", table)
    return _table((int(wrapped[1]), int(wrapped[2]))) if wrapped else table


def _setting(disk: Path, name: str, otherwise: str) -> str:
    setting = disk / "queue" / name
    return setting.read_text().strip() if setting.exists() else otherwise


def _sysfs(numbers: Numbers) -> Path:
    return Path(f"/sys/dev/block/{numbers[0]}:{numbers[1]}").resolve(strict=True)


def _read_numbers(entry: Path) -> Numbers:
    major, minor = (entry / "dev").read_text().split(":")
    return int(major), int(minor)
