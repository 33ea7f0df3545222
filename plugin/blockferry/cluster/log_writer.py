"""Writing a before-image log (`log.py`), in batches that are durable.

As a log has no holes, everything that a batch needs but the pairs in the area that is being filled is one run of the
file, new areas among it. A batch is that run, then the pairs in the older area, in order, then one fdatasync. Whatever
a killed process leaves of that has a pair only for an image that is there. Of a power cut that cannot be said: see
`LogWriter.append`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from blockferry.cluster.log import ANOTHER, MOST_PIECES, rest
from blockferry.errors import LogError
from blockferry.exception_store import (
    EXCEPTION,
    area_place,
    exceptions_per_area,
    header,
    image_places,
    is_chunk,
)
from blockferry.extents import Offsets
from blockferry.kernel import sync_directory
from blockferry.layers import is_aligned

_VOID = 512
"""Bytes of a header without which a file is no log."""
_ROOM_AT_ONCE = 16 << 20
_ROOM = "Make room there, or look at the kernel log. The backup that this log is of cannot be finished: begin another."


class LogWriter:
    """A log that grows by batches. Used by one thread at a time."""

    def __init__(self, path: Path, *, chunk: int, size: int, over: bool = False) -> None:
        """Make an empty log, readable by its owner alone, of a volume of `size` bytes; it and its name are durable.

        `chunk` is a power of two. Where the log is made `over` a file that is there it takes its room: a file that
        need not grow is written twice as fast. Raise LogError if it cannot be made, or else something has that name.
        """
        if not is_chunk(chunk):
            raise ValueError(f"a log cannot have chunks of {chunk} bytes")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if over else os.O_EXCL)
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise LogError(f"{path}: cannot be made: {error.strerror}", remedy=_ROOM) from None
        try:
            begin = header(chunk)
            _write(descriptor, [memoryview(begin), memoryview(bytes(2 * chunk - len(begin)))], 0)
            os.fsync(descriptor)
            sync_directory(path.parent)
        except OSError as error:
            os.close(descriptor)
            path.unlink()
            raise LogError(f"{path}: cannot be made: {error.strerror}", remedy=_ROOM) from None
        self.path = path
        self.chunk = chunk
        self.size = size
        self.count = 0
        """Images in the log."""
        self._descriptor = descriptor
        self._direct = _opened_directly(path)
        self._usable = True
        self._logged = np.zeros(-(-size // chunk), np.bool_)

    def append(self, chunks: Offsets, images: Sequence[memoryview]) -> None:
        """Add the images of chunks, given by their numbers, in any order; they are durable when this returns.

        The image of the volume's last chunk is as short as that is. Raise ValueError for a chunk that is in the log
        already, or twice in the batch, is not of the volume, or has an image of another length.

        One fdatasync is enough, although it may make a pair durable before its image. Nobody overwrites a chunk before
        this returns, so that until then the volume itself still has the image; and a power cut in between ends the
        epoch, whose logs are then of no use. The kernel's own snapshots, which have to outlive that, flush twice.

        Raise LogError if it cannot be written: then the log takes no more, and is as it was before; if even that cannot
        be had, it has a part of the batch besides.
        """
        self._check(chunks, images)
        if not self._usable:
            raise LogError(f"{self.path}: takes no more: writing to it failed", remedy=ANOTHER)
        if not len(chunks):
            return
        self._usable = False
        pairs = np.empty(len(chunks), EXCEPTION)
        pairs["old"] = chunks
        pairs["new"] = image_places(self.count, self.count + len(chunks), self.chunk)
        try:
            self._write_run(self._run(pairs, images), self._end)
            _write(self._descriptor, [memoryview(pairs[: self._left].tobytes())], self._next_pair)
            os.fdatasync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            raise LogError(f"{self.path}: cannot be written: {error.strerror}", remedy=_ROOM) from None
        self.count += len(chunks)
        self._logged[chunks] = True
        self._usable = True

    def length(self, number: int) -> int:
        """Return the bytes of a chunk of the volume."""
        return min(self.chunk, self.size - number * self.chunk)

    def close(self) -> None:
        """Let go of the file. Closing twice is allowed."""
        descriptors = (self._descriptor, self._direct)
        self._descriptor, self._direct, self._usable = -1, -1, False
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def _end(self) -> int:
        """Where the next image goes, in bytes: the length of the file."""
        return int(image_places(self.count, self.count + 1, self.chunk)[0]) * self.chunk

    @property
    def _next_pair(self) -> int:
        """Where the next pair goes, in bytes."""
        area, within = divmod(self.count, exceptions_per_area(self.chunk))
        return area_place(area, self.chunk) * self.chunk + within * EXCEPTION.itemsize

    @property
    def _left(self) -> int:
        """How many pairs the area that is being filled still takes."""
        return exceptions_per_area(self.chunk) - self.count % exceptions_per_area(self.chunk)

    def _check(self, chunks: Offsets, images: Sequence[memoryview]) -> None:
        if len(chunks) != len(images):
            raise ValueError("not one image a chunk")
        if len(chunks) and not 0 <= int(chunks.min()) <= int(chunks.max()) < self._logged.size:
            raise ValueError("a chunk is not of the volume")
        if np.unique(chunks).size != len(chunks) or bool(self._logged[chunks].any()):
            raise ValueError("a chunk is logged twice")
        for number, image in zip(chunks.tolist(), images, strict=True):
            if image.nbytes != self.length(number):
                raise ValueError(f"the image of chunk {number} has {image.nbytes} bytes")

    def _run(self, pairs: np.ndarray[tuple[int], np.dtype[np.void]], images: Sequence[memoryview]) -> list[memoryview]:
        """Return what is written from the end of the file on: images, and the areas that begin among or after them."""
        last = int(pairs["old"].argmax())
        if len(images[last]) < self.chunk:  # the volume's last chunk is a short one
            images = list(images)
            images[last] = memoryview(bytes(images[last]).ljust(self.chunk, b"\0"))
        each = exceptions_per_area(self.chunk)
        run: list[memoryview] = []
        done = 0
        for begin in range(self._left, len(images) + 1, each):
            area = pairs[begin : begin + each].tobytes()
            run += [*images[done:begin], memoryview(area.ljust(self.chunk, b"\0"))]
            done = begin
        return [*run, *images[done:]]

    def _write_run(self, run: list[memoryview], offset: int) -> None:
        """Write past the page cache where that can be: it takes less time, and who overwrites a chunk waits for it."""
        if self._direct >= 0 and all(map(is_aligned, run)):
            with contextlib.suppress(OSError):  # what is wrong with it, if anything but that way, shows below
                _write(self._direct, run, offset)
                return
        _write(self._descriptor, run, offset)

    def _cut(self) -> None:
        """Make the file durable as it is without anything beyond its last pair and image."""
        zeros = bytes(self._left * EXCEPTION.itemsize)
        _write(self._descriptor, [memoryview(zeros)], self._next_pair)
        os.ftruncate(self._descriptor, self._end)
        os.fdatasync(self._descriptor)


def make_room(path: Path, size: int) -> None:
    """Make a file of so many bytes for logs to be made over; void what is there. LogError if there is no room."""
    try:
        with open(path, "r+b" if path.exists() else "w+b", opener=_for_its_owner) as file:
            file.write(bytes(_VOID))
            file.truncate(min(file.seek(0, os.SEEK_END), size))
            while (there := file.seek(0, os.SEEK_END)) < size:
                file.write(bytes(min(_ROOM_AT_ONCE, size - there)))
            os.fsync(file.fileno())
    except OSError as error:
        raise LogError(f"{path}: no room for logs can be made: {error.strerror}", remedy="Make room there.") from None


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _opened_directly(path: Path) -> int:
    """Return a descriptor that passes the page cache by, -1 where the filesystem has none such."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1


def _write(descriptor: int, pieces: list[memoryview], offset: int) -> None:
    """Write pieces one after the other, in as few calls as possible."""
    while pieces:
        count = os.pwritev(descriptor, pieces[:MOST_PIECES], offset)
        offset, pieces = offset + count, rest(pieces, count)
