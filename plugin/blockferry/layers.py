"""Things that can be read at an offset, and stacks of them.

A `Layer` answers for the bytes of its extent set. A `Stack` puts layers over each other: for every byte the first
layer that has it wins, and a byte that none has reads as zero. Restoring, merging, verifying, exporting and undoing
are all reads of some stack.
"""

from __future__ import annotations

import errno
import heapq
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Protocol, Self, runtime_checkable

import numpy as np

from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet

_BOUNCE = 1 << 20
"""Bytes that a read with unaligned ends is cut into."""
_READ_THROUGH = 64 << 10
"""Gaps in what is wanted of a layer that are cheaper to read than to leave out, in bytes: less than any chunk."""


@runtime_checkable
class Layer(Protocol):
    """Random access to some of a volume's bytes.

    `read_into` may be called from several threads at once.
    """

    @property
    def size(self) -> int:
        """The size of the volume, in bytes."""

    @property
    def extents(self) -> ExtentSet:
        """The bytes that this layer answers for."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset` on; bytes outside `extents` read as zero.

        Raise BlockferryError if a byte cannot be had: a layer never makes one up.
        """

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Yield `(offset, bytes)` of the extents in order, in pieces of at most `batch` bytes.

        Reads ahead where that is faster. A yielded view is valid until the next step.
        """

    def give_up(self, error: BaseException) -> None:
        """Have reads that wait for others raise `error`: no other will come. From any thread."""

    def close(self) -> None:
        """Let go of files, processes and locks. Closing twice is allowed."""


class BaseLayer:
    """What most layers share: streaming by plain reads, and being a context manager."""

    size: int
    extents: ExtentSet

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; each kind of layer says how."""
        raise NotImplementedError

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the extents' bytes in order, from one buffer that is filled again at each step."""
        buffer = memoryview(bytearray(batch))
        for start, length in extents:
            for offset in range(start, start + length, batch):
                piece = buffer[: min(batch, start + length - offset)]
                self.read_into(offset, piece)
                yield offset, piece

    def give_up(self, error: BaseException) -> None:
        """No read waits for another."""

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class FileLayer(BaseLayer):
    """All bytes of an open file or block device, from `base` on."""

    def __init__(self, descriptor: int, size: int, *, base: int = 0, name: str = "volume") -> None:
        """Borrow `descriptor`: whoever opened it closes it."""
        self.descriptor = descriptor
        self.size = size
        self.extents = ExtentSet.whole(size)
        self.base = base
        self.name = name
        self.bytes_read = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer by `preadv`; raise VolumeError if the volume fails, vanished or shrank."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], self.base + offset + done)
            except OSError as error:
                gone = error.errno in (errno.ENXIO, errno.ENODEV)
                raise VolumeError(
                    f"{self.name}: reading {len(buffer)} bytes at {offset} failed: {error.strerror}",
                    remedy="The device vanished." if gone else "Look at the kernel log: the disk may be failing.",
                ) from None
            if not count:
                raise VolumeError(
                    f"{self.name}: ends at {offset + done}, but had {self.size} bytes when the backup began",
                    remedy="Do not resize a volume while it is backed up; run the backup again.",
                )
            done += count
        self.bytes_read += done


class DirectLayer(FileLayer):
    """All bytes of a block device opened with O_DIRECT (open(2)): what is read takes nobody's place in the page cache.

    Places, lengths and addresses in memory have to be aligned then. What is not goes through a buffer that is.
    """

    def __init__(self, descriptor: int, size: int, *, block_size: int, base: int = 0, name: str = "volume") -> None:
        """Borrow `descriptor`; `base` and `size` are multiples of the device's `block_size`."""
        super().__init__(descriptor, size, base=base, name=name)
        self.block_size = block_size
        # Not thread-local: a thread that C owns (libfuse's) is a new one to Python at every call.
        self.idle: list[memoryview] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer straight from the device where everything is aligned, else by way of a page-aligned one."""
        if is_aligned(buffer) and (offset | len(buffer)) % self.block_size == 0:
            super().read_into(offset, buffer)
            return
        try:
            bounce = self.idle.pop()
        except IndexError:
            bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        end = offset + len(buffer)
        start = offset // self.block_size * self.block_size
        while start < end:
            length = min(len(bounce), -(-(end - start) // self.block_size) * self.block_size)
            super().read_into(start, bounce[:length])
            begin, stop = max(start, offset), min(start + length, end)
            buffer[begin - offset : stop - offset] = bounce[begin - start : stop - start]
            start += length
        self.idle.append(bounce)


class CutLayer(BaseLayer):
    """Another layer, answering only for some extents: the rest reads as zero."""

    def __init__(self, layer: Layer, extents: ExtentSet, *, gap: int = _READ_THROUGH) -> None:
        """Answer for `extents` of `layer`; gaps of at most `gap` bytes are read through and then zeroed."""
        self.layer = layer
        self.size = layer.size
        self.extents = extents.intersection(layer.extents)
        self.gap = gap

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read what is wanted of the layer below and zero everything else."""
        if self.extents.covers(offset, offset + len(buffer)):
            self.layer.read_into(offset, buffer)
            return
        wanted = self.extents.clip(offset, offset + len(buffer))
        position = offset
        for start, length in wanted.coalesce(self.gap):
            self.layer.read_into(start, buffer[start - offset : start - offset + length])
        for start, length in wanted:
            _zero(buffer[position - offset : start - offset])
            position = start + length
        _zero(buffer[position - offset :])

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Leave it to the layer below where nothing of it is to be cut off."""
        if extents.difference(self.extents):
            yield from super().stream(extents, batch)
        else:
            yield from self.layer.stream(extents, batch)

    def close(self) -> None:
        """Close the layer below."""
        self.layer.close()


class CheckedLayer(BaseLayer):
    """A layer whose every read is followed by checks that what was read is still what it was."""

    def __init__(self, layer: Layer, *checks: Callable[[], object]) -> None:
        self.layer = layer
        self.checks = checks
        self.size = layer.size
        self.extents = layer.extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read, then make sure that nobody wrote meanwhile."""
        self.layer.read_into(offset, buffer)
        for check in self.checks:
            check()


class Stack(BaseLayer):
    """Layers in order: for each byte the first that has it wins; a byte that none has is zero."""

    def __init__(self, layers: list[Layer], size: int) -> None:
        self.layers = layers
        self.size = size
        self.extents = ExtentSet.empty().union(*(layer.extents for layer in layers))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read every byte from the first layer that has it."""
        missing = ExtentSet.from_pairs([(offset, len(buffer))])
        for layer in self.layers:
            found = missing.intersection(layer.extents)
            if found:
                _read_pieces(layer, found, offset, buffer)
                missing = missing.difference(found)
            if not missing:
                return
        for start, length in missing:
            _zero(buffer[start - offset : start - offset + length])

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Have every layer stream, and read ahead, what it is the first to have; merge that in order."""
        streams, missing = [], extents
        for layer in self.layers:
            found = missing.intersection(layer.extents)
            if found:
                streams.append(layer.stream(found, batch))
                missing = missing.difference(found)
        # What no layer has reads as zero, and the base class reads it from us.
        streams.append(super().stream(missing, batch))
        yield from heapq.merge(*streams, key=lambda piece: piece[0])

    def close(self) -> None:
        """Close every layer."""
        for layer in self.layers:
            layer.close()


def _read_pieces(layer: Layer, pieces: ExtentSet, offset: int, buffer: memoryview) -> None:
    """Read pieces of a layer to their places in a buffer that begins at `offset`.

    What it has between two of them is read through, where that is little: a repository fetches whole chunks.
    """
    for start, length in pieces.coalesce(_READ_THROUGH).intersection(layer.extents):
        place = buffer[start - offset : start - offset + length]
        if pieces.covers(start, start + length):
            layer.read_into(start, place)
            continue
        through = memoryview(bytearray(length))
        layer.read_into(start, through)
        for at, size in pieces.clip(start, start + length).shift(-start):
            place[at : at + size] = through[at : at + size]


def _zero(view: memoryview) -> None:
    """Set every byte of the view to zero."""
    if len(view):
        view[:] = bytes(len(view))


def is_aligned(buffer: memoryview) -> bool:
    """Tell whether memory begins with a page, as reading and writing past the page cache takes it."""
    return not len(buffer) or np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] % mmap.PAGESIZE == 0
