"""libfuse's callbacks, answered from a `Tree`. Imported by `fuse.py` alone, which says how libfuse is found.

mfusepy brings the C structures and the loop. Its handlers are replaced where they copy: a tree fills libfuse's own
buffer, and a directory is listed with its entries' attributes (READDIRPLUS), which spares a request an entry.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mfusepy

from blockferry import kernel
from blockferry.fuse_tree import Node, OwnedTree, Tree, WritableTree

log = logging.getLogger(__name__)

_MOST_PER_READ = 1 << 20
"""What the kernel asks for at once: its own limit of 256 pages."""
_THREADS = 8
"""How many threads are kept waiting for requests."""
_MOST_THREADS = 32
"""How many requests are answered at once: writes that a guard logs wait for each other."""
_FOREVER = 86400.0
"""Seconds for which the kernel may trust names and attributes: a tree does not change while it is mounted."""
_FILL_DIR_PLUS = 2
"""`FUSE_FILL_DIR_PLUS` of fuse.h: the entry carries its attributes."""


class _Callbacks:
    """The operations that libfuse is to call: mfusepy looks for their names here, `TreeServer` has their code.

    `listxattr` is not among them: libfuse then answers ENOSYS, and the kernel never asks again.
    """

    use_ns = True
    init = getattr = readdir = open = read = lseek = True


class _WritingCallbacks(_Callbacks):
    """Those of a tree that can be written to."""

    write = fsync = fallocate = True


class _OwnedCallbacks(_Callbacks):
    """Those of a tree of files that have owners and attributes."""

    readlink = getxattr = listxattr = True


class TreeServer(mfusepy.FUSE):  # type: ignore[misc]  # mfusepy has no types
    """Serves a tree from being made until the tree is unmounted. The callbacks' names are mfusepy's."""

    def __init__(self, tree: Tree, point: Path, ready: threading.Event, *, shared: bool = False) -> None:
        """Mount `tree` on `point` and set `ready` when it answers; RuntimeError if libfuse cannot mount it.

        If it is `shared` other users see it too, as far as the modes of its files let them.
        """
        self.tree = tree
        self.ready = ready
        self.writable: WritableTree | None = tree if isinstance(tree, WritableTree) else None
        self.owned: OwnedTree | None = tree if isinstance(tree, OwnedTree) else None
        callbacks = _OwnedCallbacks() if self.owned else _Callbacks()
        super().__init__(
            _WritingCallbacks() if self.writable else callbacks,
            os.fspath(point),
            foreground=True,
            ro=not self.writable,
            fsname="blockferry",
            subtype="blockferry",
            max_read=_MOST_PER_READ,
            allow_other=shared,
            default_permissions=shared,
            # Left out, libfuse 3.14 complains about its own default on stderr (lib/helper.c).
            max_idle_threads=_THREADS,
            max_threads=_MOST_THREADS,
        )

    @property
    def _writing(self) -> WritableTree:
        if self.writable is None:
            raise OSError(errno.EROFS, "read-only")
        return self.writable

    def _wrapper(self, func: Callable[..., int | None], *arguments: Any) -> int:
        """Call a callback; what it raises becomes an errno, for an exception cannot pass through C."""
        try:
            return func(*arguments) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except BaseException:
            log.exception("the tree failed")
            return -errno.EIO

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        """Set what is only settable here, and tell whoever waits that the kernel has connected."""
        connection.contents.max_read = _MOST_PER_READ
        settings = config.contents
        settings.use_ino = 1
        # Reads then come as the reader makes them, up to the limit, and do not fill the page cache. A loop device
        # does that by itself, and is slower on a file that is served so. Files that people open are read again.
        settings.direct_io = not self.writable and not self.owned
        settings.entry_timeout = settings.attr_timeout = settings.negative_timeout = _FOREVER
        self.ready.set()

    def getattr_fuse_3(self, path: bytes, into: Any, _file: Any) -> None:
        """Answer `stat`."""
        ctypes.memset(into, 0, ctypes.sizeof(mfusepy.c_stat))
        _fill(into.contents, self.tree.node(os.fsdecode(path)))

    def readdir_fuse_3(self, path: bytes, into: Any, add: Any, _offset: int, _file: Any, _flags: int) -> None:
        """List a directory in one go: libfuse keeps the listing while the directory is open."""
        directory = os.fsdecode(path)
        entry = mfusepy.c_stat()
        itself = self.tree.node(directory)
        for name, node in [(".", itself), ("..", itself), *self.tree.children(directory)]:
            _fill(entry, node)
            if add(into, os.fsencode(name), entry, 0, _FILL_DIR_PLUS):
                raise OSError(errno.ENOMEM, "the listing does not fit")

    def open(self, path: bytes, file: Any) -> None:
        """Open a file for reading."""
        if not self.writable and file.contents.flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        name = os.fsdecode(path)
        file.contents.fh = self.tree.open(name)
        if self.tree.node(name).uncached:
            file.contents.direct_io = 1

    def read(self, _path: bytes, into: Any, size: int, offset: int, file: Any) -> int:
        """Let the tree fill libfuse's buffer."""
        buffer = ctypes.cast(into, ctypes.POINTER(ctypes.c_ubyte * size)).contents
        return self.tree.read_into(file.contents.fh, offset, memoryview(buffer).cast("B"))

    def write(self, _path: bytes, data: Any, size: int, offset: int, file: Any) -> int:
        """Have the tree take libfuse's buffer."""
        buffer = ctypes.cast(data, ctypes.POINTER(ctypes.c_ubyte * size)).contents
        self._writing.write_from(file.contents.fh, offset, memoryview(buffer).cast("B"))
        return size

    def fsync(self, _path: bytes, _only_data: int, file: Any) -> None:
        """Make what was written durable."""
        self._writing.sync(file.contents.fh)

    def fallocate(self, _path: bytes, mode: int, offset: int, length: int, file: Any) -> None:
        """Zero a range: of the modes (linux/falloc.h) those that do so and leave the size alone."""
        if mode not in (kernel.PUNCH_HOLE_KEEP_SIZE, kernel.ZERO_RANGE_KEEP_SIZE):
            raise OSError(errno.EOPNOTSUPP, "only holes can be punched")
        self._writing.zero(file.contents.fh, offset, length)

    def readlink(self, path: bytes, into: Any, size: int) -> None:
        """Answer where a symbolic link leads."""
        if self.owned is None:
            raise OSError(errno.EINVAL, "no symbolic link")
        target = self.owned.target(os.fsdecode(path))[: size - 1] + b"\0"
        ctypes.memmove(into, target, len(target))

    def getxattr(self, path: bytes, name: bytes, into: Any, size: int, *_position: int) -> int:
        """Answer an extended attribute, or with no room for it its size."""
        value = (self.owned.attributes(os.fsdecode(path)) if self.owned else {}).get(name)
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return _handed_over(value, into, size)

    def listxattr(self, path: bytes, into: Any, size: int) -> int:
        """List the names of extended attributes, each with a NUL, or with no room for them their size."""
        names = self.owned.attributes(os.fsdecode(path)) if self.owned else {}
        return _handed_over(b"".join(name + b"\0" for name in names), into, size)

    def lseek(self, _path: bytes, offset: int, whence: int, file: Any) -> int:
        """Answer SEEK_DATA and SEEK_HOLE: the kernel does the other kinds by itself."""
        return self.tree.seek(file.contents.fh, offset, whence)


def _fill(entry: Any, node: Node) -> None:
    """Write a node into a C `struct stat`."""
    entry.st_ino = node.inode
    entry.st_size = node.size
    if (owned := node.owned) is None:
        entry.st_mode = stat.S_IFDIR | 0o700 if node.is_directory else stat.S_IFREG | 0o600
        entry.st_nlink = 1
        entry.st_blocks = -(-node.size // 512)
    else:
        entry.st_mode, entry.st_uid, entry.st_gid = owned.mode, owned.uid, owned.gid
        entry.st_nlink, entry.st_rdev, entry.st_blocks = owned.links, owned.device, -(-owned.allocated // 512)
    ctime_ns = owned.ctime_ns if owned else node.mtime_ns
    times = ((entry.st_mtimespec, node.mtime_ns), (entry.st_ctimespec, ctime_ns), (entry.st_atimespec, node.mtime_ns))
    for time, nanoseconds in times:
        time.tv_sec, time.tv_nsec = divmod(nanoseconds, 10**9)


def _handed_over(value: bytes, into: Any, size: int) -> int:
    """Copy a value where libfuse wants it, and return its length; OSError with ERANGE if there is too little room."""
    if size:
        if len(value) > size:
            raise OSError(errno.ERANGE, "too little room")
        ctypes.memmove(into, value, len(value))
    return len(value)
