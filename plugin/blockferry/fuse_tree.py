"""What a tree of files is that exists only while it is mounted: `fuse.py` mounts one, an adapter makes it up."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from blockferry.extents import ExtentSet


class Owned(NamedTuple):
    """What `stat` says of a file that had a life elsewhere: its mode with its kind, owner, names, and bytes on disk."""

    mode: int
    uid: int
    gid: int
    links: int
    device: int
    ctime_ns: int
    allocated: int


class Node(NamedTuple):
    """What `stat` says of a directory or file: its inode, its size in bytes and its times in ns since the epoch.

    Everything else is fixed: owned by root, for its owner's eyes alone, ctime and atime as mtime; unless it is `owned`.
    Of a file that is `uncached` nothing stays in the kernel's page cache: each read and write reaches the tree.
    """

    inode: int
    is_directory: bool
    size: int
    mtime_ns: int
    uncached: bool = False
    owned: Owned | None = None


class Tree(Protocol):
    """A tree of directories and files whose names and sizes do not change while it is mounted.

    Called from several threads at once. An OSError reaches the reader as its errno; anything else as EIO, after it
    was logged: a tree that wants to know of its failures catches them itself.
    """

    def node(self, path: str) -> Node:
        """Return what is at a path, absolute within the tree; raise FileNotFoundError if nothing is."""

    def children(self, path: str) -> Iterable[tuple[str, Node]]:
        """Return what is in a directory, in the order in which it is to be listed."""

    def open(self, path: str) -> int:
        """Return a handle, any number from 0 to 2**63, by which a file is read."""

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with the file's bytes from `offset` on; return how many there were.

        Less than the buffer holds means that the file ends there.
        """

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """Return where data (`os.SEEK_DATA`) or a hole (`os.SEEK_HOLE`) begins at or after `offset`.

        Raise OSError with ENXIO if there is none, with ENOSYS if the tree knows of no holes: it is never asked again
        then, for any file.
        """


@runtime_checkable
class WritableTree(Tree, Protocol):
    """A tree whose files' content can be written. What was read before may be in the kernel's page cache."""

    def write_from(self, handle: int, offset: int, data: memoryview) -> None:
        """Write all of `data` into a file, at an offset; raise OSError with EFBIG beyond its end."""

    def zero(self, handle: int, offset: int, length: int) -> None:
        """Make a range of a file read as zeros."""

    def sync(self, handle: int) -> None:
        """Make all that was written to a file durable."""


@runtime_checkable
class OwnedTree(Tree, Protocol):
    """A tree of files that had a life elsewhere: of every kind, with owners and extended attributes."""

    def target(self, path: str) -> bytes:
        """Return where a symbolic link leads."""

    def attributes(self, path: str) -> Mapping[bytes, bytes]:
        """Return the extended attributes of what is at a path."""


def seek_in(extents: ExtentSet, size: int, offset: int, whence: int) -> int:
    """Return where data, or a hole, begins at or after `offset` in a file that has data at extents; see `Tree.seek`."""
    if 0 <= offset < size:
        data = extents.clip(offset, size)
        if whence == os.SEEK_HOLE:
            return int(data.ends[0]) if data and int(data.starts[0]) == offset else offset
        if whence == os.SEEK_DATA and data:
            return int(data.starts[0])
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
