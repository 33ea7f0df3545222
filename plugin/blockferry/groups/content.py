"""Where the content of one file lies: on the disk where that can be read, else in the file itself."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import numpy as np
import numpy.typing as npt

from blockferry.groups.table import BESIDE

PIECE = np.dtype([("logical", "<i8"), ("address", "<i8"), ("length", "<i8")])
"""A piece of a file as it was found; an address of BESIDE: to be read through the filesystem."""

_FIEMAP = 0xC020660B
_FS_IOC_GETFLAGS = 0x80086601
_ENCODED_FILES = 0x4 | 0x800 | 0x4000
"""Inode flags: compressed, encrypted, data journaled. What is on the disk is not what a reader sees."""
_LAST, _UNWRITTEN = 0x1, 0x800
_NO_ADDRESS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_ROOM = 64
_HEAD = struct.Struct("=QQIIII")
_FOUND = struct.Struct("=QQQ16xI12x")
_PIECE = struct.Struct("=qqq")
_END = (1 << 64) - 1
_HOLE = -2


class Contents:
    """Asks for the pieces of files. `addressable`: what the filesystem says is where the device has the bytes."""

    def __init__(self, *, addressable: bool, checks_flags: bool, device: int) -> None:
        """`checks_flags`: single files may be kept in a way of their own, as on ext4; `device`: st_dev of all this."""
        self.device = device
        self.addressable = addressable
        self.checks_flags = checks_flags
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

    def pieces(self, descriptor: int, facts: os.stat_result) -> bytes:
        """Return the pieces, PIECE each, of an open file, given what it is; what was never written is left out.

        ext4, XFS and btrfs answer when a write that is under way is over.
        """
        own = facts.st_dev == self.device
        if self.mapped:
            try:
                return self._mapped(descriptor, facts.st_size, own=own)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
                # What is mounted over a single file says nothing of the others.
                self.mapped = not own
        return _data(descriptor, facts.st_size)

    def _mapped(self, descriptor: int, size: int, *, own: bool) -> bytes:
        """Ask by FIEMAP (Documentation/filesystems/fiemap.rst); what is dirty was written out before."""
        found = bytearray()
        start, last, buffer = 0, False, self._buffer
        plain = own and self.addressable and not (self.checks_flags and self._encoded(descriptor))
        while not last:
            _HEAD.pack_into(buffer, 0, start, _END - start, 0, 0, _ROOM, 0)
            fcntl.ioctl(descriptor, _FIEMAP, buffer)
            count = _HEAD.unpack_from(buffer)[3]
            if not count:
                break
            for number in range(count):
                logical, address, length, flags = _FOUND.unpack_from(buffer, _HEAD.size + number * _FOUND.size)
                start = logical + length
                last = bool(flags & _LAST)
                if flags & _UNWRITTEN or logical >= size:
                    continue
                if flags & _NO_ADDRESS or not plain:
                    address = BESIDE
                found += _PIECE.pack(logical, address, min(start, size) - logical)
        return bytes(found)

    def _encoded(self, descriptor: int) -> bool:
        """Tell whether a file's bytes on the disk are not what a reader gets, or may be elsewhere too."""
        flags: int = struct.unpack_from("=l", fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(8)))[0]
        return bool(flags & _ENCODED_FILES)


def _data(descriptor: int, size: int) -> bytes:
    """Return a file's pieces by lseek(2): its holes are all that is known."""
    found, place = bytearray(), 0
    while place < size:
        try:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            start, place = place, size
        if start < size:  # it may have grown meanwhile
            found += _PIECE.pack(start, BESIDE, min(place, size) - start)
    return bytes(found)


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
