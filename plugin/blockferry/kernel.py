"""What Linux offers and Python's `os` and `fcntl` do not: a handful of calls and ioctl numbers.

Numbers are those of linux/fs.h and linux/falloc.h; all of them raise OSError as `os` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
"""Mode of `fallocate`: give the space back, read as zeros, leave the size alone."""
ZERO_RANGE_KEEP_SIZE = 0x10 | 0x01
"""Mode of `fallocate`: read as zeros, by whatever means; on a block device zeros are written if nothing else can be."""

_FICLONE = 0x40049409
_BLKROGET = 0x125E
_BLKRRPART = 0x125F
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_READ_ONLY, _LOOP_AUTOCLEAR = 1, 4
_LOOP_CONFIG = struct.Struct("=II52xI240x")
"""Of struct loop_config (linux/loop.h) the file, the block size (0: as the kernel likes), the flags."""
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.syncfs.argtypes = (ctypes.c_int,)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """Punch or zero a range of a file or device, as `mode` says (the call of that name, of which `os` has one mode)."""
    while True:
        with contextlib.suppress(InterruptedError):
            _checked(_libc.fallocate(descriptor, mode, offset, length))
            return


def syncfs(descriptor: int) -> None:
    """Write out everything dirty of the filesystem that the descriptor lies on."""
    _checked(_libc.syncfs(descriptor))


def give_back_memory() -> None:
    """Have the C library return what was freed to the kernel: glibc keeps it otherwise (malloc_trim(3))."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_new(source: str, target: str) -> None:
    """Rename a file to a name that is not taken; raise FileExistsError if it is.

    Where the filesystem cannot do it in one step (NFS, some FUSE ones), look first.
    """
    try:
        _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        Path(source).rename(target)


def clone(source: int, target: int) -> None:
    """Make one open file share all blocks of another, at one instant: ioctl_ficlone(2).

    Raise OSError: EOPNOTSUPP or EXDEV where the filesystem cannot, ENOSPC without room for the metadata.
    """
    # btrfs shares blocks only between files that agree on copy-on-write, and disk images often have it off.
    with contextlib.suppress(OSError):
        flags = struct.unpack("=l4x", fcntl.ioctl(source, _FS_IOC_GETFLAGS, bytes(8)))[0]
        if flags & _FS_NOCOW_FL:
            fcntl.ioctl(target, _FS_IOC_SETFLAGS, struct.pack("=l4x", _FS_NOCOW_FL))
    fcntl.ioctl(target, _FICLONE, source)


def is_read_only(descriptor: int) -> bool:
    """Tell whether a block device takes no writes: opening it for writing may succeed all the same."""
    return fcntl.ioctl(descriptor, _BLKROGET, bytes(4)) != bytes(4)


def reread_partitions(descriptor: int) -> None:
    """Have the kernel read a disk's partition table again; raise OSError (EINVAL: cannot have one, EBUSY: in use)."""
    fcntl.ioctl(descriptor, _BLKRRPART)


def forget_pages(descriptor: int) -> None:
    """Drop what the page cache holds of a file or device, so that the next read comes from below it."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def read_lease(descriptor: int) -> Iterator[None]:
    """Hold a lease on a file opened for reading: while it lasts, whoever opens it for writing waits in open(2).

    fcntl(2), "Leases". Raise OSError: EAGAIN if somebody has the file open for writing; EACCES if it is another
    user's and CAP_LEASE is missing; others where the filesystem knows no leases.
    """
    with _lease(descriptor, fcntl.F_RDLCK):
        yield


@contextlib.contextmanager
def write_lease(descriptor: int) -> Iterator[None]:
    """Hold a lease on a file that nobody else has open: while it lasts, whoever opens it waits in open(2).

    Raise OSError as `read_lease` does; EAGAIN if anybody has it open.
    """
    with _lease(descriptor, fcntl.F_WRLCK):
        yield


@contextlib.contextmanager
def _lease(descriptor: int, kind: int) -> Iterator[None]:
    # The kernel announces a writer by SIGIO, which kills; SIGURG is ignored by default, and `lease_held` tells as well.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def lease_held(descriptor: int) -> bool:
    """Tell whether a lease stands: false from the moment that a writer wants the file."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_UNLCK


def attach_loop_read_only(descriptor: int) -> int:
    """Show an open file or device, without opening it again, as a loop device; return that, opened for reading.

    It goes away when nobody has it open or mounted any more, this process included. Raise OSError: EINVAL or ENOTTY
    before Linux 5.8.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            loop = os.open(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                config = _LOOP_CONFIG.pack(descriptor, 0, _LOOP_READ_ONLY | _LOOP_AUTOCLEAR)
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # else somebody was quicker
                    raise
            else:
                return loop
    finally:
        os.close(control)


def _checked(result: int) -> None:
    """Raise the OSError of a failed C call."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
