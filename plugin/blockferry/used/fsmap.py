"""Used blocks of a mounted ext4 or XFS filesystem: the kernel's own answer, FS_IOC_GETFSMAP (ioctl_getfsmap(2)).

In use is everything but the records whose owner is "free"; what no record covers, such as the bytes behind the
filesystem's end, is in use too. Before it is asked, a filesystem that is mounted for writing writes back what it
holds in memory (syncfs(2)): file data that waits for its blocks gets them, and what was freed is free on disk or in
the journal too. A filesystem that is frozen has done so already.

Two things are left to others. A filesystem mounted without replaying its journal (`norecovery`, `noload`) shows a
state that the next mount will change: the readers of unmounted filesystems look at the journal and decide. An XFS
with a realtime section keeps files on another device. The log of an XFS may be on another device: its records are
passed over.

The structures are those of linux/fsmap.h; all sizes and places in them are bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets
from blockferry.hookspecs import Declined, UsedBlocks, hookimpl
from blockferry.volume import Mount, Volume

_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs")
"""The kernel's ext4 serves ext2 and ext3 under their own names; btrfs does not know the call."""
_GETFSMAP = 0xC0C0583B
_RECORDS = 65536
"""Records asked for at once: 4 MiB."""

_RECORD = np.dtype(
    [
        *(("device", "=u4"), ("flags", "=u4"), ("physical", "=u8"), ("owner", "=u8"), ("offset", "=u8")),
        *(("length", "=u8"), ("reserved", "=u8", 3)),
    ]
)
_HEAD = np.dtype(
    [
        *(("in_flags", "=u4"), ("out_flags", "=u4"), ("count", "=u4"), ("entries", "=u4"), ("reserved", "=u8", 6)),
        *(("low", _RECORD), ("high", _RECORD)),
    ]
)
_SPECIAL_OWNER, _LAST = 0x10, 0x20
"""Record flags: the owner is a code, not an inode; this is the last record of all."""
_DEVICE_NUMBERS = 0x1
"""Head flag: `device` is a device number."""
_FREE = 1
_XFS_LOG = (ord("X") << 32) | 2
"""The owner of an XFS log (XFS_FMR_OWN_LOG, xfs_fs.h)."""


class _NoAnswerError(Exception):
    """The kernel's answer cannot be used; the message is the reason."""


@hookimpl
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Answer for a volume that is mounted, itself or through a loop device, as ext4 or XFS."""
    mounts = [mount for mount in volume.mounts() if mount.filesystem in _FILESYSTEMS]
    if not mounts:
        return None
    try:
        with _open(mounts) as (descriptor, mount):
            if not mount.read_only:
                _sync(descriptor)
            free = ExtentSet.from_ranges(*_concatenate(_free_ranges(descriptor, mount)))
    except _NoAnswerError as error:
        declined(f"getfsmap: {error}")
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            declined(f"getfsmap: {mounts[0].point}: {error.strerror}")
        return None
    return UsedBlocks(free.complement(volume.size), "getfsmap")


@contextlib.contextmanager
def _open(mounts: list[Mount]) -> Iterator[tuple[int, Mount]]:
    """Open a place where the volume is mounted; raise _NoAnswerError if there is none to ask."""
    if len({mount.device for mount in mounts}) > 1:
        raise _NoAnswerError("it is mounted more than once through different devices")
    if any(mount.options & {"norecovery", "noload"} for mount in mounts):
        raise _NoAnswerError(f"{mounts[0].point} is mounted without replaying its journal")
    for mount in mounts:
        # A single file can be a mount point, even a pipe.
        descriptor = os.open(mount.point, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Something else may be mounted over it.
            if os.fstat(descriptor).st_dev == os.makedev(*mount.device):
                yield descriptor, mount
                return
        finally:
            os.close(descriptor)
    raise _NoAnswerError(f"{mounts[0].point} lies hidden under another mount")


def _sync(descriptor: int) -> None:
    """Write a filesystem back; the standard library has no syncfs."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _free_ranges(descriptor: int, mount: Mount) -> Iterator[tuple[Offsets, Offsets]]:
    """Yield starts and ends of what is free, in batches."""
    major, minor = mount.device
    # The kernel's own encoding of device numbers (new_encode_dev).
    device = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    for records in _records(descriptor):
        here = records["device"] == device
        special = (records["flags"] & _SPECIAL_OWNER) != 0
        if bool((~here & ~(special & (records["owner"] == _XFS_LOG))).any()):
            raise _NoAnswerError("it keeps files on a further device (a realtime section)")
        free = records[here & special & (records["owner"] == _FREE)]
        starts = free["physical"].astype(np.int64)
        yield starts, starts + free["length"].astype(np.int64)


def _records(descriptor: int) -> Iterator[npt.NDArray[np.void]]:
    """Yield all records of a filesystem, on all its devices, in batches that are valid until the next step."""
    buffer = np.zeros(_HEAD.itemsize + _RECORDS * _RECORD.itemsize, np.uint8)
    head = buffer[: _HEAD.itemsize].view(_HEAD)
    records = buffer[_HEAD.itemsize :].view(_RECORD)
    head["count"] = _RECORDS
    for field in ("device", "flags", "physical", "owner", "offset"):
        head["high"][field] = np.iinfo(_RECORD[field]).max
    while True:
        fcntl.ioctl(descriptor, _GETFSMAP, buffer.data, True)
        entries = int(head["entries"][0])
        if not entries:
            return
        if not int(head["out_flags"][0]) & _DEVICE_NUMBERS:
            raise _NoAnswerError("it has several sections on one device")
        yield records[:entries]
        last = records[entries - 1]
        if int(last["flags"]) & _LAST:
            return
        if last == head["low"][0]:
            raise _NoAnswerError("the kernel answers the same over and over")
        head["low"] = last


def _concatenate(ranges: Iterator[tuple[Offsets, Offsets]]) -> tuple[Offsets, Offsets]:
    """Return all batches as one."""
    none = np.empty(0, np.int64)
    starts, ends = zip((none, none), *ranges, strict=True)
    return np.concatenate(starts), np.concatenate(ends)
