"""The holes of a sparse image file: the last resort, whatever the image holds.

A hole reads as zeros, and zeros are what a restore leaves where nothing is stored, so leaving holes out is right for
any content. The filesystem that the file lies on tells its holes by `lseek` (SEEK_DATA, SEEK_HOLE; lseek(2)).

A file can have a hole at every other block. The number of calls is bounded by taking each stretch of data to be at
least a 2^20th of the volume long, or 64 KiB, the smallest unit that a repository stores: 16 MiB in 16 TiB.
"""

from __future__ import annotations

import errno
import os

from blockferry.extents import ExtentSet
from blockferry.hookspecs import Declined, UsedBlocks, hookimpl
from blockferry.snapshot import SPARSE
from blockferry.volume import Volume

_LEAST = 64 << 10
_MOST_STRETCHES = 1 << 20


@hookimpl
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Answer for an image file that has holes."""
    extents = data_extents(volume)
    return UsedBlocks(extents, SPARSE) if extents.total < volume.size else None


def data_extents(volume: Volume) -> ExtentSet:
    """Return the bytes of a volume that may be other than zero as far as its file's holes tell: for a device, all."""
    if volume.is_device:
        return ExtentSet.whole(volume.size)
    least = max(_LEAST, volume.size // _MOST_STRETCHES)
    pairs = []
    with volume.open() as layer:
        position, end = volume.offset, volume.offset + volume.size
        while position < end:
            start = _seek(layer.descriptor, position, os.SEEK_DATA, end)
            if start >= end:
                break
            position = _seek(layer.descriptor, start + least, os.SEEK_HOLE, end)
            pairs.append((start - volume.offset, position - start))
    return ExtentSet.from_pairs(pairs)


def _seek(descriptor: int, position: int, what: int, end: int) -> int:
    """Return where data or a hole begins at or behind a position, at most `end`."""
    try:
        return min(end, os.lseek(descriptor, position, what))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        # Nothing but a hole from here on, or the position is behind the file's end.
        return end
