"""A group's image as the repository reads it: from the volume in large reads, from files, at the end from memory."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.groups.packing import Packed
from blockferry.groups.table import BESIDE
from blockferry.layers import BaseLayer, Layer

_GAP = 64 << 10
"""Bytes on the disk that are cheaper to read through than to leave out."""
_BLOCK = 4096
_SCRATCH = 8 << 20
"""Bytes of the volume that are read at a time, at most."""
_STALLED = 300.0
"""Seconds without any read after which whoever asks for the end of the image is told that it is too early."""

ReadFile = Callable[[int, int, memoryview], None]
"""Takes a row, an offset in its file, and a buffer to fill."""
Seal = Callable[[], Mapping[int, bytes | bytearray]]
"""Called once, when all that is to be read was read: returns what belongs at places of the image behind that."""


class GroupImage(BaseLayer):
    """The data of a group's image. What of it comes last says how the rest of it went, and so waits for it."""

    def __init__(
        self,
        packed: Packed,
        unit: int,
        disk: Layer | None,
        read_file: ReadFile,
        seal: Seal,
        was_read: Callable[[int], None],
    ) -> None:
        """`unit` is the size of the chunks in which the image will be read, each whole and once; `disk` the volume.

        `was_read` is told up to which place of the image all was read.
        """
        self.size = packed.block_map.size
        self.extents = packed.read.union(ExtentSet.from_pairs([packed.late, packed.table_place]))
        self.bytes_read = 0
        self._runs = packed.runs
        # Searched at every read: a column of `runs` would be copied for that each time.
        self._starts = packed.runs["place"].copy()
        self._ends = self._starts + packed.runs["length"]
        self._disk = disk
        self._read_file = read_file
        self._seal = seal
        self._sealed: Mapping[int, bytes | bytearray] | None = None
        self._sealing = threading.Lock()
        self._last = packed.late[0]
        self._coverage = _Coverage(packed.read, unit)
        self._was_read = was_read
        self._idle: list[memoryview] = []
        """Buffers that the device can read into, page-aligned."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; raise VolumeError if the volume or a file fails."""
        if offset >= self._last:
            self._read_end(offset, buffer)
            return
        if offset + len(buffer) > self._last:
            # One read over both: what comes last is not known before the rest was read.
            self.read_into(offset, buffer[: self._last - offset])
            self.read_into(self._last, buffer[self._last - offset :])
            return
        _fill(buffer, self._gaps(offset, len(buffer)))
        try:
            for run in self._spans(offset, len(buffer)):
                self._read_span(run, offset, buffer)
        except BaseException as error:
            self._coverage.fail(error)
            raise
        self._was_read(self._coverage.mark(offset, len(buffer)))

    def give_up(self, error: BaseException) -> None:
        """Have whoever waits for the end of the image fail: what it waits for is not read any more."""
        self._coverage.fail(error)

    def _which(self, offset: int, length: int) -> slice:
        """Return the runs that lie in a stretch of the image, if only in part."""
        first = int(np.searchsorted(self._ends, offset, side="right"))
        return slice(first, int(np.searchsorted(self._starts, offset + length, side="left")))

    def _gaps(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the stretches of a buffer that no run fills."""
        which = self._which(offset, length)
        starts = (self._runs["place"][which] - offset).clip(0, length)
        ends = (self._ends[which] - offset).clip(0, length)
        begins, stops = np.append(0, ends), np.append(starts, length)
        some = stops > begins
        return list(zip(begins[some].tolist(), stops[some].tolist(), strict=True))

    def _spans(self, offset: int, length: int) -> Iterator[npt.NDArray[np.void]]:
        """Yield runs, cut to a stretch of the image, that one read of the volume brings, or one of a file."""
        runs = self._runs[self._which(offset, length)].copy()
        if not runs.size:
            return
        starts = np.maximum(runs["place"], offset)
        skipped = starts - runs["place"]
        runs["length"] = np.minimum(runs["place"] + runs["length"], offset + length) - starts
        runs["place"] = starts
        runs["logical"] += skipped
        runs["address"][runs["address"] != BESIDE] += skipped[runs["address"] != BESIDE]
        after = runs["address"][:-1] + runs["length"][:-1]
        distance = runs["address"][1:] - after
        apart = (distance < 0) | (distance > _GAP) | (runs["address"][1:] == BESIDE) | (runs["address"][:-1] == BESIDE)
        for near in np.split(runs, np.flatnonzero(apart) + 1):
            yield from _cut(near)

    def _read_span(self, runs: npt.NDArray[np.void], offset: int, buffer: memoryview) -> None:
        """Read runs that lie close to each other on the volume, or one of a file, into their places of the buffer."""
        address = int(runs["address"][0])
        place = int(runs["place"][0]) - offset
        if address == BESIDE:
            into = buffer[place : place + int(runs["length"][0])]
            self._read_file(int(runs["row"][0]), int(runs["logical"][0]), into)
            self.bytes_read += len(into)
            return
        if self._disk is None:
            raise VolumeError("there is no volume to read from")
        begin = address // _BLOCK * _BLOCK
        end = min(-(-int(runs["address"][-1] + runs["length"][-1]) // _BLOCK) * _BLOCK, self._disk.size)
        scratch = self._idle.pop() if self._idle else memoryview(mmap.mmap(-1, _SCRATCH))
        self._disk.read_into(begin, scratch[: end - begin])
        self.bytes_read += end - begin
        places, lengths = (runs["place"] - offset).tolist(), runs["length"].tolist()
        for place, length, source in zip(places, lengths, (runs["address"] - begin).tolist(), strict=True):
            buffer[place : place + length] = scratch[source : source + length]
        self._idle.append(scratch)

    def _read_end(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from what is made when everything else was read."""
        self._coverage.wait()
        with self._sealing:
            if self._sealed is None:
                self._sealed = self._seal()
        _fill(buffer, [(0, len(buffer))])
        for place, content in self._sealed.items():
            start, end = max(place, offset), min(place + len(content), offset + len(buffer))
            if start < end:
                buffer[start - offset : end - offset] = content[start - place : end - place]


class _Coverage:
    """Which bytes are still to be read, by chunks: reads may come in any order, from several threads, and twice."""

    def __init__(self, extents: ExtentSet, unit: int) -> None:
        self._extents = extents
        self._unit = unit
        chunks = extents.align(unit, 1 << 62)
        self._left = chunks.total // unit
        self._front = int(chunks.starts[0]) // unit if chunks else 0
        """The first chunk that was not read."""
        self._parts: dict[int, ExtentSet] = {}
        """Of chunks that were read in part: what is left."""
        self._done: set[int] = set()
        """Those behind it that were."""
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def mark(self, offset: int, length: int) -> int:
        """Note that a stretch was read; return up to where all was."""
        end = offset + length
        with self._changed:
            for number in range(offset // self._unit, -(-end // self._unit)):
                if number >= self._front and number not in self._done:
                    self._mark(number, offset, end)
            while self._front in self._done:
                self._done.remove(self._front)
                self._front += 1
            if self._left <= 0:
                self._changed.notify_all()
            return self._front * self._unit

    def _mark(self, number: int, offset: int, end: int) -> None:
        """Note what of a chunk was read. One that has nothing to be read does not count."""
        start, stop = number * self._unit, (number + 1) * self._unit
        before = self._parts.pop(number, None) or self._extents.clip(start, stop)
        left = before.clip(start, offset).union(before.clip(end, stop))
        if left:
            self._parts[number] = left
            return
        self._done.add(number)
        if before:
            self._left -= 1

    def fail(self, error: BaseException) -> None:
        """Have whoever waits fail as well."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all was read; raise what went wrong."""
        with self._changed:
            while self._left > 0 and self._failure is None:
                if not self._changed.wait(_STALLED):
                    raise VolumeError(
                        f"the repository asked for the end of the image with {self._left} chunks not read",
                        remedy="Run the backup again; if it comes back, this is a fault of blockferry's.",
                    )
            if self._failure is not None:
                raise self._failure


def _cut(runs: npt.NDArray[np.void]) -> Iterator[npt.NDArray[np.void]]:
    """Yield runs that lie close to each other, a read of the volume at a time."""
    most = _SCRATCH - 2 * _BLOCK
    while runs.size and runs["address"][0] != BESIDE:
        begin = int(runs["address"][0])
        fits = int(np.searchsorted(runs["address"] + runs["length"], begin + most, side="right"))
        if fits:
            yield runs[:fits]
            runs = runs[fits:]
        else:
            first = runs[:1].copy()
            first["length"] = most // _BLOCK * _BLOCK
            yield first
            runs = runs.copy()
            for column in ("place", "address", "logical"):
                runs[column][0] += first["length"][0]
            runs["length"][0] -= first["length"][0]
    if runs.size:
        yield runs


def open_row(root: bytes, path: bytes) -> int:
    """Open a file of a group for reading, following no symbolic link at its end."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    whole = os.path.join(root, path)  # a name is bytes
    try:
        return os.open(whole, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(whole, flags)


def _fill(buffer: memoryview, stretches: list[tuple[int, int]]) -> None:
    """Zero stretches of a buffer."""
    for start, end in stretches:
        buffer[start:end] = bytes(end - start)
