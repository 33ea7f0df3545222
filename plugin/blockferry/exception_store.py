"""The format in which device-mapper keeps what was overwritten: the persistent exception store of its snapshots.

It is that of the kernel's drivers/md/dm-snap-persistent.c, version 1. Everything is little-endian, and in chunks of the
size that the header names, a power of two:

    chunk 0                          magic "SnAp", valid, version 1, chunk size in sectors, each a u32
    chunk 1 + n * (exceptions + 1)   area n: pairs (chunk of the volume, chunk of the store) of u64, `exceptions` of
                                     them, as many as a chunk holds; the first without a second half is the end
    all others                       images: what was copied out

An area that is full is followed by the next, which is therefore zeroed before the last pair of an area is written. The
kernel gives out the chunks for images in order; after a crash there can be some that no pair names.

What is read is not trusted: it comes from a disk.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np

from blockferry.extents import Offsets

SECTOR = 512
MOST_CHUNK = 16 << 20
"""The largest chunk that is read or written, in bytes; LVM makes none above 512 KiB."""

EXCEPTION = np.dtype([("old", "<u8"), ("new", "<u8")])
VALID_AT = 4
"""Where in the header `valid` is."""
_HEADER = np.dtype([("magic", "<u4"), ("valid", "<u4"), ("version", "<u4"), ("chunk", "<u4")])
_MAGIC = 0x70416E53
_VERSION = 1


class ExceptionStoreError(Exception):
    """This is no exception store that can be used; the message says what is wrong, to follow the store's name."""


class VoidStoreError(ExceptionStoreError):
    """The store was given up by whoever wrote it: something is missing in it."""


def is_chunk(chunk: int) -> bool:
    """Tell whether chunks may be of so many bytes."""
    return SECTOR <= chunk <= MOST_CHUNK and not chunk & (chunk - 1)


def exceptions_per_area(chunk: int) -> int:
    """Return how many pairs an area has, with chunks of `chunk` bytes."""
    return chunk // EXCEPTION.itemsize


def area_place(area: int, chunk: int) -> int:
    """Return the chunk of the store that is area number `area`."""
    return 1 + area * (exceptions_per_area(chunk) + 1)


def image_places(first: int, end: int, chunk: int) -> Offsets:
    """Return the chunks of the store for the images `[first, end)`, counted from 0 on in the order of their pairs."""
    numbers = np.arange(first, end, dtype=np.int64)
    return 2 + numbers + numbers // exceptions_per_area(chunk)


def header(chunk: int) -> bytes:
    """Return the header of a valid store, without the zeros that fill its chunk."""
    return np.array([(_MAGIC, 1, _VERSION, chunk // SECTOR)], _HEADER).tobytes()


def read_header(descriptor: int) -> int:
    """Return the bytes of a chunk of a store that is whole; raise ExceptionStoreError if it is none.

    `descriptor` may be opened with O_DIRECT.
    """
    buffer = mmap.mmap(-1, mmap.PAGESIZE)
    if os.preadv(descriptor, [buffer], 0) < SECTOR:
        raise ExceptionStoreError("is cut short")
    magic, valid, version, sectors = np.frombuffer(buffer, _HEADER, 1).tolist()[0]
    if magic != _MAGIC or version != _VERSION:
        raise ExceptionStoreError("does not begin as the kernel writes it")
    if valid != 1:
        raise VoidStoreError("is void")
    if not is_chunk(sectors * SECTOR):
        raise ExceptionStoreError(f"has chunks of {sectors * SECTOR} bytes")
    return int(sectors) * SECTOR


def read_areas(descriptor: int, chunk: int, chunks: int) -> Iterator[tuple[Offsets, Offsets]]:
    """Yield the pairs of each area in order: chunks of the volume, of which there are `chunks`, and of the store.

    `chunk` is what `read_header` returned. Raise ExceptionStoreError for what the kernel does not write, except
    that a chunk may be named twice. `descriptor` may be opened with O_DIRECT if a chunk is what that can read.
    """
    room = os.lseek(descriptor, 0, os.SEEK_END) // chunk
    buffer = mmap.mmap(-1, chunk)  # direct I/O wants an aligned buffer
    stride = exceptions_per_area(chunk) + 1
    for place in range(1, room, stride):
        if os.preadv(descriptor, [buffer], place * chunk) != chunk:
            raise ExceptionStoreError("is cut short")
        area = np.frombuffer(buffer, EXCEPTION)
        ends = np.flatnonzero(area["new"] == 0)
        old, new = (area[half][: ends[0] if ends.size else None] for half in ("old", "new"))
        if bool((old >= chunks).any()) or bool((new >= room).any()):
            raise ExceptionStoreError("names chunks that its devices do not have")
        if bool((new % stride == 1).any()):
            raise ExceptionStoreError("names its own areas")
        yield old.astype(np.int64), new.astype(np.int64)
        if ends.size:
            return
    raise ExceptionStoreError("has no end")
