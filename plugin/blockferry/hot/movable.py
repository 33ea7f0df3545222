"""A disk that can be moved to its target while it is mounted: a linear device-mapper device in front of it.

When all is there the table is exchanged for one that leads to the target, in one step of the kernel's: it holds new
requests back, waits for those that are under way, and goes on with the other table (dm-ioctl, DM_DEV_SUSPEND without
its flag: "resume"; a device that is not suspended is suspended first). For that moment the cache writes through: what
reaches the target by the old way is on the disk when the new way begins to read from there.

Where there is no device-mapper the disk is the loop device itself, and stays so until it is unmounted.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from blockferry.errors import BlockferryError
from blockferry.hot.cache import TargetCache
from blockferry.hot.disk import attach_loop, detach_loops
from blockferry.inuse import holders_and_mounts
from blockferry.programs import find, look_for

_SECTOR = 512


def mapper_name(name: str) -> str:
    """Return what the device-mapper device of a restore is called."""
    return f"blockferry-{name}"


def mapper_path(name: str) -> Path:
    """Return where that device is."""
    return Path("/dev/mapper") / mapper_name(name)


class MovableDisk:
    """The device that a restore's user sees."""

    def __init__(self, name: str, device: str, size: int, *, is_movable: bool) -> None:
        self.name = name
        self.device = device
        self.size = size
        self.is_movable = is_movable
        self.moved = False

    def users(self) -> list[str]:
        """Return who uses the disk, a phrase each."""
        return users_of(self.device)

    def move(self, cache: TargetCache) -> None:
        """Lead the device to the target, which is whole; raise BlockferryError if it stays where it is."""
        target, is_file = cache.about.target, not stat.S_ISBLK(os.stat(cache.about.target).st_mode)
        cache.target.release()
        below = attach_loop(Path(target), block_size=cache.about.block_size, read_only=False) if is_file else target
        try:
            _dmsetup("load", mapper_name(self.name), "--table", _table(self.size, below))
            cache.write_through()
            _dmsetup("resume", mapper_name(self.name))
        except BaseException:
            _dmsetup("clear", mapper_name(self.name), check=False)
            if is_file:
                detach_loops(Path(target))
            raise
        self.moved = True


@contextlib.contextmanager
def movable(name: str, device: str, size: int, *, wanted: bool) -> Iterator[MovableDisk]:
    """Put a device in front of another that can be moved, if it is `wanted` and this kernel has device-mapper.

    It goes away with the context, unless it was moved.
    """
    if not wanted or size % _SECTOR or not _device_mapper_is_there():
        yield MovableDisk(name, device, size, is_movable=False)
        return
    _dmsetup("create", mapper_name(name), "--table", _table(size, device))
    if not mapper_path(name).exists():
        _dmsetup("mknodes", mapper_name(name))  # where no udev runs
    disk = MovableDisk(name, os.fspath(mapper_path(name)), size, is_movable=True)
    try:
        yield disk
    finally:
        if not disk.moved:
            # In use: it goes as soon as nobody uses it any more, and what is below it then fails.
            _dmsetup("remove", "--deferred", mapper_name(name), check=False)


def remove_moved(name: str, target: str) -> None:
    """Take away the device of a restore that was moved; raise BlockferryError if it is in use."""
    path = mapper_path(name)
    if not path.exists():
        return
    if users := users_of(os.fspath(path)):
        raise BlockferryError(f"{name}: in use: {'; '.join(users)}", remedy="Unmount it.")
    _dmsetup("remove", mapper_name(name))
    if os.path.isfile(target):  # noqa: PTH113
        detach_loops(Path(target))


def users_of(device: str) -> list[str]:
    """Return who uses a block device, a phrase each."""
    number = os.stat(device).st_rdev
    return holders_and_mounts((os.major(number), os.minor(number)))


def _device_mapper_is_there() -> bool:
    """Tell whether this kernel has device-mapper, and this machine the program that speaks to it."""
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return look_for("dmsetup") is not None


def _table(size: int, device: str) -> str:
    return f"0 {size // _SECTOR} linear {device} 0"


def _dmsetup(*words: str, check: bool = True) -> None:
    done = subprocess.run(
        [find("dmsetup"), *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if check and done.returncode:
        raise BlockferryError(
            f"dmsetup {words[0]} {words[1]} failed: {done.stderr.strip()}", remedy="Look at the kernel log (dmesg)."
        )
