"""Which blocks of a target are there: a bit a block, in memory and in a file.

    offset 0        a line of JSON: what the map is of; padded with zero bytes to a page
    then            `present`: a bit a block, least significant first, padded with ones to whole pages
    then            `dirty`: likewise, padded with zeros

A bit only ever goes from 0 to 1. That is why the file needs no journal: whatever mix of old and new pages or sectors a
power cut leaves, each bit in it was true. What a bit promises, `present`: the block on the target is durable, has to
be so before the bit is. `sync` keeps that order:

    1. take the pages in which a bit was set since the last time
    2. make the target durable: all data that those bits are about was handed to it before
    3. write those pages, and make them durable

A block is of 4 KiB, or as large as needed for the map of any volume to be of 2^28 bits at most: 32 MiB, twice.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry.kernel import sync_directory

PAGE = 4096
_BITS_PER_PAGE = PAGE * 8
_MOST_BLOCKS = 1 << 28
_PIECE = 1 << 20
_ROOM = "Make room there, or look at the kernel log: nothing that is written to the disk is durable until this works."
_BATCH = 1 << 24
"""Blocks that are looked at in one pass of numpy: 16 MiB."""


def block_size_for(size: int) -> int:
    """Return the bytes of a block for a volume of `size` bytes: a power of two."""
    return int(max(4096, 1 << max(0, (-(-size // _MOST_BLOCKS) - 1).bit_length())))


def runs(mask: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, end, value) of the runs of equal bits among the `count` lowest of `mask`."""
    position = 0
    while position < count:
        value = bool(mask >> position & 1)
        other = (~mask if value else mask) >> position
        length = (other & -other).bit_length() - 1 if other else count
        end = min(position + length, count)
        yield position, end, value
        position = end


class Bits:
    """A bit a block. Reading needs no lock; setting is locked. Knows the pages that changed since they were taken."""

    def __init__(self, count: int, content: bytearray) -> None:
        """Take the stored form: whole pages."""
        self.count = count
        self.content = content
        # By pieces: one number of all of it would be as large again.
        pieces = (content[start : start + _PIECE] for start in range(0, len(content), _PIECE))
        self.total = sum(int.from_bytes(piece, "little").bit_count() for piece in pieces)
        self.total -= len(content) * 8 - count if content else 0
        self._lock = threading.Lock()
        self._changed: set[int] = set()

    def mask(self, first: int, end: int) -> int:
        """Return the bits `[first, end)` as a number, the first one lowest."""
        part = int.from_bytes(self.content[first >> 3 : (end + 7) >> 3], "little") >> (first & 7)
        return part & ((1 << (end - first)) - 1)

    def all(self, first: int, end: int) -> bool:
        """Tell whether every bit of `[first, end)` is set."""
        return self.mask(first, end) == (1 << (end - first)) - 1

    def set(self, first: int, end: int) -> None:
        """Set the bits `[first, end)`."""
        with self._lock:
            ones = (1 << (end - first)) - 1
            missing = ones & ~self.mask(first, end)
            if not missing:
                return
            begin, stop = first >> 3, (end + 7) >> 3
            old = int.from_bytes(self.content[begin:stop], "little")
            self.content[begin:stop] = (old | missing << (first & 7)).to_bytes(stop - begin, "little")
            self.total += missing.bit_count()
            self._changed.update(range(first // _BITS_PER_PAGE, (end - 1) // _BITS_PER_PAGE + 1))

    def take_changed(self) -> dict[int, bytes]:
        """Return the pages in which a bit was set since the last call, by number."""
        with self._lock:
            numbers, self._changed = self._changed, set()
            return {each: bytes(self.content[each * PAGE : (each + 1) * PAGE]) for each in numbers}

    def give_back(self, pages: dict[int, bytes]) -> None:
        """Count pages as changed again: writing them failed."""
        with self._lock:
            self._changed.update(pages)


class StateMap:
    """The map of one target, and its file."""

    def __init__(self, path: Path, size: int, block: int, present: Bits, dirty: Bits) -> None:
        self.path = path
        self.size = size
        self.block = block
        self.present = present
        self.dirty = dirty
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._syncing = threading.Condition()
        self._busy = False
        self._begun = self._done = 0

    @classmethod
    def create(cls, path: Path, size: int, about: dict[str, Any], absent: ExtentSet) -> Self:
        """Make the file, under its name only when it is whole: every block that `absent` touches is absent.

        `about` says what the map is of; whoever opens it has to say the same.
        """
        block = block_size_for(size)
        count = -(-size // block)
        present = _bits_outside(absent.align(block, count * block), block, count)
        dirty = bytearray(len(present))
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            header = _header(size, block, about)
            for piece in (header, b"\0" * (PAGE - len(header)), present, dirty):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
        return cls(path, size, block, Bits(count, present), _zero_padded(count, dirty))

    @classmethod
    def load(cls, path: Path, size: int, about: dict[str, Any]) -> Self:
        """Return the map in a file; raise BlockferryError if it is not one of this size, about this."""
        block = block_size_for(size)
        count = -(-size // block)
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise BlockferryError(
                f"{path}: cannot be read: {error.strerror}",
                remedy="Detach it with --forget, and begin anew with --force.",
            ) from None
        header = _header(size, block, about)
        length = _stored_length(count)
        if not stored.startswith(header) or len(stored) != PAGE + 2 * length:
            raise BlockferryError(
                f"{path}: is not the map of this restore",
                remedy="Detach it with --forget, and begin anew with --force.",
            )
        content = memoryview(stored)[PAGE:]
        present, dirty = Bits(count, bytearray(content[:length])), _zero_padded(count, bytearray(content[length:]))
        return cls(path, size, block, present, dirty)

    def whole(self, unit: int) -> bytearray:
        """Return a byte for each unit of `unit` bytes, a multiple of the block: 1 where all its blocks are present."""
        each = unit // self.block // 8
        units = -(-self.size // unit)
        bits = np.frombuffer(self.present.content, np.uint8)
        full = np.full(units * each, 0xFF, np.uint8)
        shared = min(bits.size, full.size)
        full[:shared] = bits[:shared]
        return bytearray((full.reshape(units, each) == 0xFF).all(axis=1).astype(np.uint8).tobytes())

    def sync(self, make_durable: Callable[[], None]) -> None:
        """Make the target durable by `make_durable`, and then the map. Whoever waits meanwhile shares the next time."""
        with self._syncing:
            ticket = self._begun + 1  # the first that begins from now on
            while self._busy and self._done < ticket:
                self._syncing.wait()
            if self._done >= ticket:
                return
            self._busy = True
            self._begun += 1
            number = self._begun
        try:
            self._sync(make_durable)
            with self._syncing:
                self._done = number
        finally:
            with self._syncing:
                self._busy = False
                self._syncing.notify_all()

    def close(self) -> None:
        """Close the file; what was not synced is not in it."""
        os.close(self._descriptor)

    def _sync(self, make_durable: Callable[[], None]) -> None:
        taken = [(bits, bits.take_changed()) for bits in (self.present, self.dirty)]
        try:
            make_durable()
            for place, (_bits, pages) in zip((PAGE, PAGE + len(self.present.content)), taken, strict=True):
                for number, page in sorted(pages.items()):
                    _write_all(self._descriptor, page, place + number * PAGE)
            if any(pages for _bits, pages in taken):
                os.fdatasync(self._descriptor)
        except BaseException as error:
            for bits, pages in taken:
                bits.give_back(pages)
            if isinstance(error, OSError):
                raise BlockferryError(f"{self.path}: writing failed: {error.strerror}", remedy=_ROOM) from None
            raise


def _header(size: int, block: int, about: dict[str, Any]) -> bytes:
    header = (
        json.dumps({"blockferry hot map": 1, "size": size, "block": block, **about}, sort_keys=True).encode() + b"\n"
    )
    if len(header) > PAGE:
        raise BlockferryError("the names of this restore are too long for its map")
    return header


def _stored_length(count: int) -> int:
    return -(-count // _BITS_PER_PAGE) * PAGE


def _zero_padded(count: int, content: bytearray) -> Bits:
    """Return bits whose padding is zeros, and so does not count."""
    bits = Bits(count, content)
    bits.total += len(content) * 8 - count
    return bits


def _bits_outside(extents: ExtentSet, block: int, count: int) -> bytearray:
    """Return the bits of the blocks that extents, on the grid of blocks, do not have; the padding is ones."""
    content = bytearray(b"\xff") * _stored_length(count)
    for first in range(0, count, _BATCH):
        end = min(first + _BATCH, count)
        inside = extents.clip(first * block, end * block).shift(-first * block)
        if not inside:
            continue
        edges = np.zeros(end - first + 1, np.int8)
        edges[inside.starts // block] += 1
        edges[inside.ends // block] -= 1
        outside = np.cumsum(edges[:-1], dtype=np.int8) == 0
        packed = np.packbits(outside, bitorder="little")
        if (end - first) % 8:
            packed[-1] |= 0xFF << ((end - first) % 8) & 0xFF
        content[first // 8 : first // 8 + packed.size] = packed.tobytes()
    return content


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]
