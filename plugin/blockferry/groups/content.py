"""Where the content of one file lies: on the disk where that can be read, else in the file itself."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from blockferry.groups.table import BESIDE

PIECE = np.dtype([("logical", "<i8"), ("address", "<i8"), ("length", "<i8")])
"""A piece of a file as it was found; an address of BESIDE: to be read through the filesystem."""

_FIEMAP = 0xC020660B
_LAST, _UNWRITTEN = 0x1, 0x800
_NO_ADDRESS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_ROOM = 64
_HEAD = struct.Struct("=QQIIII")
_FOUND = struct.Struct("=QQQ16xI12x")
_MAPPED, _MAPPED_AT = struct.Struct("=I"), 20
_PIECE = struct.Struct("=qqq")
_END = (1 << 64) - 1
_HOLE = -2


class Contents:
    """Asks for the pieces of files."""

    def __init__(self, *, addressable: bool, otherwise: Callable[[int], bool] | None = None) -> None:
        """`addressable`: the device has the bytes where the filesystem says, unless an open file is `otherwise`."""
        self.addressable = addressable
        self.otherwise = otherwise
        self.mapped = True
        """Whether the filesystem says anything at all."""
        self._buffer = bytearray(_HEAD.size + _ROOM * _FOUND.size)

    def open(self, name: bytes, directory: int | None) -> int:
        """Open a file for reading without a trace in its times."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(name, flags | os.O_NOATIME, dir_fd=directory)
        except PermissionError:  # O_NOATIME is for the owner
            return os.open(name, flags, dir_fd=directory)

    def pieces(self, descriptor: int, size: int, into: bytearray, *, own: bool = True) -> int:
        """Append the pieces, PIECE each, of an open file that has so many bytes; return how many there are.

        What was never written is left out. `own`: it is of this filesystem, and not mounted over a file of it. ext4,
        XFS and btrfs answer when a write that is under way is over. Raise OSError; FileNotFoundError for what is no
        regular file.
        """
        before = len(into)
        if self.mapped:
            try:
                return self._mapped(descriptor, size, into, own=own)
            except OSError as error:
                del into[before:]  # else those of the next file would be taken for these
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise FileNotFoundError(errno.ENOENT, "it was replaced by something else") from None
                self.mapped = not own
        return _data(descriptor, size, into)

    def _mapped(self, descriptor: int, size: int, into: bytearray, *, own: bool) -> int:
        """Ask by FIEMAP (Documentation/filesystems/fiemap.rst); what is dirty was written out before."""
        start, found, last, buffer = 0, 0, False, self._buffer
        plain = own and self.addressable and not (self.otherwise and self.otherwise(descriptor))
        while not last:
            _HEAD.pack_into(buffer, 0, start, _END - start, 0, 0, _ROOM, 0)
            fcntl.ioctl(descriptor, _FIEMAP, buffer)
            count = _MAPPED.unpack_from(buffer, _MAPPED_AT)[0]
            if not count:
                break
            for place in range(_HEAD.size, _HEAD.size + count * _FOUND.size, _FOUND.size):
                logical, address, length, flags = _FOUND.unpack_from(buffer, place)
                start = logical + length
                if flags:
                    last = bool(flags & _LAST)
                    if flags & _UNWRITTEN:
                        continue
                if logical >= size:
                    continue
                if not plain or flags & _NO_ADDRESS:
                    address = BESIDE
                into += _PIECE.pack(logical, address, min(start, size) - logical)
                found += 1
        return found


def _data(descriptor: int, size: int, into: bytearray) -> int:
    """Append a file's pieces by lseek(2): its holes are all that is known."""
    found, place = 0, 0
    while place < size:
        try:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            start, place = place, size
        if start < size:  # it may have grown meanwhile
            into += _PIECE.pack(start, BESIDE, min(place, size) - start)
            found += 1
    return found


def compare(then: bytes, now: bytes) -> tuple[bool, bool]:
    """Tell of a file's pieces, as they were found twice, whether the same bytes of it were ever written, and whether
    those that were read by their place on the disk still lie there.
    """
    if then == now:
        return True, True
    both = [np.frombuffer(each, PIECE) for each in (then, now)]
    edges = np.unique(np.concatenate([np.append(each["logical"], each["logical"] + each["length"]) for each in both]))
    before, after = (_addresses(each, edges[:-1]) for each in both)
    stays = (before == after) | (before == BESIDE) | (before == _HOLE)
    return bool(((before == _HOLE) == (after == _HOLE)).all()), bool(stays.all())


def _addresses(pieces: npt.NDArray[np.void], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the address of each place in a file."""
    found = np.full(places.size, _HOLE, np.int64)
    if pieces.size:
        which = (np.searchsorted(pieces["logical"], places, side="right") - 1).clip(0)
        within = places - pieces["logical"][which]
        has = (within >= 0) & (within < pieces["length"][which])
        address = pieces["address"][which]
        found[has] = np.where(address == BESIDE, BESIDE, address + within)[has]
    return found
