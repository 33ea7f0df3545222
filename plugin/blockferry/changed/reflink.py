"""What changed in an image file on a filesystem that shares blocks between files (XFS, btrfs).

The checkpoint is a reflink copy of the image, kept beside it under a hidden name. It holds on to the blocks that the
image had; what is written to the image goes elsewhere, because they are shared. So a place where both files have the
same address on the disk was not written to, and every other place was: no data is read. What lies at no address of
its own (compressed, inline) counts as changed, and so does what was moved by a defragmentation.

The copy takes no room at first, and later as much as was written to the image since; one is kept for each repository.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blockferry import kernel
from blockferry.extents import ExtentSet, Offsets
from blockferry.fiemap import FileExtents, file_extents
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.volume import Volume

NAME = "reflink"
_MARK = "user.blockferry.snapshot"


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Keep a reflink copy of an image file."""
    image = Path(volume.path)
    if volume.is_device or not image.is_file() or named not in ("", NAME):
        return None
    image = image.resolve()
    copy = image.with_name(f".{image.name}.blockferry-{snapshot}")
    try:
        with _opened(image, os.O_RDONLY) as source, _opened(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
            try:
                kernel.clone(source, target)
                os.setxattr(target, _MARK, snapshot.encode())
                os.fsync(target)
                state = {"copy": str(copy), **_facts(target)}
            except BaseException:
                copy.unlink()
                raise
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV):
            declined(f"reflink: {copy}: {error.strerror}")
        return None
    return Checkpoint(NAME, snapshot, state)


@hookimpl
def blockferry_changed_extents(
    volume: Volume, still: Volume, since: Checkpoint, declined: Declined
) -> ChangedBlocks | None:
    """Compare the addresses of the kept copy with those of the image."""
    if since.tracker != NAME:
        return None
    copy = Path(str(since.state.get("copy")))
    try:
        with _opened(copy, os.O_RDONLY) as before, _opened(Path(still.path), os.O_RDONLY) as now:
            if os.getxattr(before, _MARK) != since.snapshot.encode():
                declined(f"reflink: {copy} is not the copy of snapshot {since.snapshot}")
                return None
            if any(since.state.get(name) != value for name, value in _facts(before).items()):
                declined(f"reflink: somebody changed {copy}, the copy of snapshot {since.snapshot}")
                return None
            if os.fstat(before).st_dev != os.fstat(now).st_dev:
                declined(f"reflink: {copy} and {volume.path} are on different filesystems")
                return None
            changed = differences(file_extents(before), file_extents(now))
    except OSError as error:
        declined(f"reflink: {copy}: {error.strerror}")
        return None
    window = changed.clip(still.offset, still.offset + still.size).shift(-still.offset)
    return ChangedBlocks(window, "reflink copy")


@hookimpl
def blockferry_release_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove the copy, if it is one."""
    if checkpoint.tracker != NAME:
        return
    copy = Path(str(checkpoint.state.get("copy")))
    with contextlib.suppress(OSError):
        if os.getxattr(copy, _MARK, follow_symlinks=False) == checkpoint.snapshot.encode():
            copy.unlink()


def _facts(descriptor: int) -> dict[str, int]:
    """Return what tells a copy from one that was written to or replaced: reading, sharing and moving it leave these."""
    facts = os.fstat(descriptor)
    return {"inode": facts.st_ino, "ctime_ns": facts.st_ctime_ns}


def differences(before: FileExtents, now: FileExtents) -> ExtentSet:
    """Return the bytes at which two files do not share their blocks."""
    edges = np.unique(np.concatenate([before.starts, before.ends, now.starts, now.ends]))
    if edges.size < 2:
        return ExtentSet.empty()
    one, other = _shifts(before, edges[:-1]), _shifts(now, edges[:-1])
    different = (one != other) | (one == _UNKNOWN)
    return ExtentSet.from_ranges(edges[:-1][different], edges[1:][different])


_HOLE = np.iinfo(np.int64).max
_UNKNOWN = _HOLE - 1


def _shifts(extents: FileExtents, places: Offsets) -> Offsets:
    """Return, for what begins at each of the places, by how much its address is larger than its place in the file."""
    if not extents.starts.size:
        return np.full(places.size, _HOLE, np.int64)
    index = np.searchsorted(extents.starts, places, side="right") - 1
    inside = (index >= 0) & (places < extents.ends[index])
    shifts = np.where(extents.plain[index], extents.addresses[index] - extents.starts[index], _UNKNOWN)
    return np.where(inside, shifts, _HOLE)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
