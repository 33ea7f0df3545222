"""The plugin that knows of which filesystems FIEMAP gives addresses on the device: ext2, ext3, ext4 and XFS.

btrfs gives addresses of its own, which it maps to devices: its files are read one by one.
"""

from __future__ import annotations

import contextlib
import fcntl
import struct
from pathlib import Path

from blockferry.hookspecs import Declined, FilesOnDisk, hookimpl
from blockferry.inuse import device_name
from blockferry.volume import Mount

_FS_IOC_GETFLAGS = 0x80086601
_ENCODED = 0x4 | 0x800 | 0x4000
"""Inode flags of ext4: compressed, encrypted, data journaled. What is on the disk is not what a reader sees."""
_FLAGS, _NO_FLAGS = struct.Struct("=I4x"), bytes(8)


@hookimpl
def blockferry_group_extents(mount: Mount, declined: Declined) -> FilesOnDisk | None:
    """Answer for ext2, ext3, ext4 and XFS."""
    device = device_name(mount.device)  # not udev's link to it, which may not be there yet
    if mount.filesystem == "xfs":
        if _has_realtime_blocks(device):
            declined("files may lie among realtime blocks, or the device cannot be read")
            return None
        return FilesOnDisk(device)
    if mount.filesystem not in ("ext2", "ext3", "ext4"):
        return None
    if _journals_data(mount):
        declined("what is written goes through the journal first (data=journal)")
        return None
    return FilesOnDisk(device, _encoded)


def _has_realtime_blocks(device: str) -> bool:
    """Tell whether an XFS has any, or cannot be read (struct xfs_dsb, fs/xfs/libxfs/xfs_format.h: sb_rblocks)."""
    try:
        with Path(device).open("rb") as disk:
            superblock = disk.read(24)
    except OSError:
        return True
    return superblock[:4] != b"XFSB" or any(superblock[16:24])


def _journals_data(mount: Mount) -> bool:
    """Tell whether what files hold is in the journal: the usual list of options leaves that out where it is usual."""
    name = Path(f"/sys/dev/block/{mount.device[0]}:{mount.device[1]}").resolve().name
    with contextlib.suppress(OSError):
        return "data=journal" in Path(f"/proc/fs/ext4/{name}/options").read_text().split()
    return "data=journal" in mount.options


def _encoded(descriptor: int) -> bool:
    """Tell whether a file is kept in a way of its own."""
    flags = _FLAGS.unpack(fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, _NO_FLAGS))[0]
    return bool(flags & _ENCODED)
