"""A disk that can be moved to its target while it is mounted: a linear device-mapper device in front of it.

When all is there the table is exchanged for one that leads to the target (`mapper.py`). For that moment the cache
writes through: what reaches the target by the old way is on the disk when the new way begins to read from there.

Where there is no device-mapper the disk is the loop device itself, and stays so until it is unmounted.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blockferry import mapper
from blockferry.errors import BlockferryError
from blockferry.hot.cache import TargetCache
from blockferry.hot.disk import attach_loop, detach_loops
from blockferry.inuse import users_of


def mapper_name(name: str) -> str:
    """Return what the device-mapper device of a restore is called."""
    return f"blockferry-{name}"


def mapper_path(name: str) -> Path:
    """Return where that device is."""
    return mapper.path_of(mapper_name(name))


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
            with mapper.exchanging(mapper_name(self.name), self.size, below, freeze=True):
                cache.write_through()
        except BaseException:
            if is_file:
                detach_loops(Path(target))
            raise
        self.moved = True


@contextlib.contextmanager
def movable(name: str, device: str, size: int, *, wanted: bool) -> Iterator[MovableDisk]:
    """Put a device in front of another that can be moved, if it is `wanted` and this kernel has device-mapper.

    It goes away with the context, unless it was moved.
    """
    if not wanted or size % mapper.SECTOR or not mapper.is_there():
        yield MovableDisk(name, device, size, is_movable=False)
        return
    disk = MovableDisk(name, mapper.create(mapper_name(name), size, device), size, is_movable=True)
    try:
        yield disk
    finally:
        if not disk.moved:
            mapper.remove_when_unused(mapper_name(name))  # what is below it fails, then


def remove_moved(name: str, target: str) -> None:
    """Take away the device of a restore that was moved; raise BlockferryError if it is in use."""
    path = mapper_path(name)
    if not path.exists():
        return
    if users := users_of(os.fspath(path)):
        raise BlockferryError(f"{name}: in use: {'; '.join(users)}", remedy="Unmount it.")
    mapper.remove(mapper_name(name))
    if os.path.isfile(target):  # noqa: PTH113
        detach_loops(Path(target))
