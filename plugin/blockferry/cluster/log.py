"""The before-image log of a host: what chunks of a volume held before they were first overwritten in an epoch.

It is a file in the format of a device-mapper snapshot's exception store (`exception_store.py`): the kernel can take a
log for a snapshot's copy-on-write device, and what the kernel wrote is read here. Ours have no holes: image N lies at
the Nth place that is no area:

    header | area 0 | image | image | ... | image | area 1 | image | ...      the file ends where the next image goes
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from blockferry.errors import LogError
from blockferry.exception_store import ExceptionStoreError, read_areas, read_header
from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import BaseLayer

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
            self.chunk, old, new = _read_table(self._descriptor, self.name, size)
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


def _read_table(descriptor: int, name: Path | str, size: int) -> tuple[int, Offsets, Offsets]:
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
