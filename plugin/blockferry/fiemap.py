"""Where the bytes of a file lie on its disk: the ioctl FS_IOC_FIEMAP (Linux, Documentation/filesystems/fiemap.rst)."""

from __future__ import annotations

import dataclasses
import fcntl

import numpy as np
import numpy.typing as npt

from blockferry.extents import Offsets

_FIEMAP = 0xC020660B
_SYNC = 0x1
_LAST, _UNWRITTEN, _SHARED = 0x1, 0x800, 0x2000
_NO_ADDRESS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
"""Unknown, delayed, encoded (compressed), encrypted, not aligned, inline, a tail: the address alone says nothing."""
_EXTENTS = 16384

_HEAD = np.dtype(
    [("start", "u8"), ("length", "u8"), ("flags", "u4"), ("mapped", "u4"), ("count", "u4"), ("reserved", "u4")]
)
_EXTENT = np.dtype(
    {
        "names": ["logical", "physical", "length", "flags"],
        "formats": ["u8", "u8", "u8", "u4"],
        "offsets": [0, 8, 16, 40],
        "itemsize": 56,
    }
)


@dataclasses.dataclass(frozen=True)
class FileExtents:
    """Extents of a file in its order: `[starts, ends)` in bytes lie at `addresses` of the disk.

    What was allocated and never written is left out like a hole: it reads as zeros. Where not `plain`, the address
    does not tell which bytes are there. What is `shared`, other files have too.
    """

    starts: Offsets
    ends: Offsets
    addresses: Offsets
    plain: npt.NDArray[np.bool_]
    shared: npt.NDArray[np.bool_]


def file_extents(descriptor: int) -> FileExtents:
    """Return the extents of an open file, written back first; OSError (EOPNOTSUPP) where the filesystem has none."""
    pieces = [np.empty(0, _EXTENT)]
    buffer = np.zeros(_HEAD.itemsize + _EXTENTS * _EXTENT.itemsize, np.uint8)
    head = buffer[: _HEAD.itemsize].view(_HEAD)
    extents = buffer[_HEAD.itemsize :].view(_EXTENT)
    start = 0
    while True:
        head[0] = (start, np.iinfo(np.uint64).max - np.uint64(start), _SYNC, 0, _EXTENTS, 0)
        fcntl.ioctl(descriptor, _FIEMAP, buffer.data, True)
        found = extents[: int(head["mapped"][0])].copy()
        pieces.append(found)
        if not found.size or int(found["flags"][-1]) & _LAST:
            break
        start = int(found["logical"][-1] + found["length"][-1])
    table = np.concatenate(pieces)
    table = table[table["flags"] & _UNWRITTEN == 0]
    starts = table["logical"].astype(np.int64)
    return FileExtents(
        starts,
        starts + table["length"].astype(np.int64),
        table["physical"].astype(np.int64),
        table["flags"] & _NO_ADDRESS == 0,
        table["flags"] & _SHARED != 0,
    )
