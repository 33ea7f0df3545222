"""The before-image log of a host: what chunks of a volume held before they were first overwritten in an epoch.

It is a file in the format of a device-mapper snapshot's exception store (`exception_store.py`): the kernel can take a
log for a snapshot's copy-on-write device, and what the kernel wrote is read here. Ours have no holes: image N lies at
the Nth place that is no area:

    header | area 0 | image | image | ... | image | area 1 | image | ...      the file ends where the next image goes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from blockferry.errors import LogError
from blockferry.exception_store import ExceptionStoreError, read_areas, read_header
from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import BaseLayer

if TYPE_CHECKING:
    from blockferry.cluster.log_writer import LogWriter

EDITED = 16 << 20
"""Bytes of images that are taken from logs at a time when they are made one."""
MOST_PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one call reads or writes."""
ANOTHER = "The backup that this log is of cannot be finished: begin another."


class LogLayer(BaseLayer):
    """The images in a log, as they were when it was opened; the rest of the volume reads as zero.

    Several threads may read at once.
    """

    def __init__(self, log: Path | int, size: int) -> None:
        """Open the log of a volume of `size` bytes, a path, or a descriptor that is this layer's own from now on.

        Nobody may append meanwhile. Raise LogError if it is void, torn, of another volume or no log at all.
        """
        self.name = f"log {log}" if isinstance(log, int) else str(log)
        try:
            self._descriptor = log if isinstance(log, int) else os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LogError(f"{self.name}: cannot be opened: {error.strerror}", remedy=ANOTHER) from None
        try:
            self.chunk, old, new = read_table(self._descriptor, self.name, size)
        except BaseException:
            self.close()
            raise
        order = np.argsort(old, kind="stable")
        self.size = size
        self.chunks = old[order]
        """The numbers of the chunks that were logged, sorted."""
        self._places = new[order]
        starts = self.chunks * self.chunk
        self.extents = ExtentSet.from_ranges(starts, np.minimum(starts + self.chunk, size))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with what was logged of it, and zeros."""
        end = offset + len(buffer)
        if not self.extents.covers(offset, end):
            buffer[:] = bytes(len(buffer))
        first, last = np.searchsorted(self.chunks, [offset // self.chunk, -(-end // self.chunk)])
        pieces = []
        for number, place in zip(self.chunks[first:last].tolist(), self._places[first:last].tolist(), strict=True):
            begin = number * self.chunk
            start, stop = max(begin, offset), min(begin + self.chunk, end, self.size)
            if start < stop:
                pieces.append((place * self.chunk + start - begin, buffer[start - offset : stop - offset]))
        self._read(pieces)

    def read_images(self, chunks: Offsets, images: Sequence[memoryview]) -> None:
        """Fill `images` with those of `chunks`, which were all logged, in the order of the log."""
        places = self._places[np.searchsorted(self.chunks, chunks)]
        self._read(list(zip((places * self.chunk).tolist(), images, strict=True)))

    def close(self) -> None:
        """Let go of the log. Closing twice is allowed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _read(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Fill each piece from its place in the log, neighbours together."""
        pieces.sort(key=lambda piece: piece[0])
        run: list[memoryview] = []
        begin = end = 0
        for place, piece in pieces:
            if place != end or len(run) == MOST_PIECES:
                self._read_run(run, begin)
                run, begin = [], place
            run.append(piece)
            end = place + len(piece)
        self._read_run(run, begin)

    def _read_run(self, pieces: list[memoryview], offset: int) -> None:
        while pieces:
            try:
                count = os.preadv(self._descriptor, pieces, offset)
            except OSError as error:
                raise LogError(f"{self.name}: reading failed: {error.strerror}", remedy=ANOTHER) from None
            if not count:
                raise LogError(f"{self.name}: is cut short", remedy=ANOTHER)
            offset, pieces = offset + count, rest(pieces, count)


def edit(logs: Sequence[LogLayer], writer: LogWriter) -> None:
    """Gather what several hosts logged in one, in the order of the volume.

    Raise LogError, before anything is written, if a chunk is in two logs, which claims make impossible, or the logs are
    of volumes or chunks of different sizes; also if reading or writing fails: then the writer's log is not all.
    """
    for log in logs:
        if (log.chunk, log.size) != (writer.chunk, writer.size):
            raise LogError(f"{log.name}: has other chunks, or is of another volume, than the rest", remedy=ANOTHER)
    chunks = np.concatenate([np.empty(0, np.int64), *(log.chunks for log in logs)])
    owners = np.repeat(np.arange(len(logs)), [log.chunks.size for log in logs])
    order = np.argsort(chunks, kind="stable")
    chunks, owners = chunks[order], owners[order]
    twice = np.flatnonzero(chunks[1:] == chunks[:-1])
    if twice.size:
        one, other = (logs[owner].name for owner in owners[twice[0] : twice[0] + 2])
        raise LogError(f"{one} and {other}: both have chunk {chunks[twice[0]]}", remedy=ANOTHER)
    room = max(1, EDITED // writer.chunk)
    buffer = memoryview(bytearray(min(room, chunks.size) * writer.chunk))
    for first in range(0, chunks.size, room):
        some, whose = chunks[first : first + room], owners[first : first + room]
        images = [buffer[index * writer.chunk :][: writer.length(number)] for index, number in enumerate(some.tolist())]
        for owner in np.unique(whose).tolist():
            mine = np.flatnonzero(whose == owner)
            logs[owner].read_images(some[mine], [images[index] for index in mine.tolist()])
        writer.append(some, images)


def read_table(descriptor: int, name: Path | str, size: int) -> tuple[int, Offsets, Offsets]:
    """Return the bytes of a chunk, and the pairs in the log's order; raise LogError if it is none of this volume."""
    try:
        chunk = read_header(descriptor)
        areas = list(read_areas(descriptor, chunk, -(-size // chunk)))
    except ExceptionStoreError as reason:
        _refuse(name, str(reason))
    except OSError as error:
        _refuse(name, f"cannot be read: {error.strerror}")
    old, new = (np.concatenate(half) for half in zip(*areas, strict=True))
    if any(np.unique(half).size != half.size for half in (old, new)):
        _refuse(name, "names a chunk twice")
    return chunk, old, new


def _refuse(name: Path | str, reason: str) -> NoReturn:
    raise LogError(f"{name}: this before-image log {reason}", remedy=ANOTHER)


def rest(pieces: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of pieces when the first `count` bytes are done."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []
