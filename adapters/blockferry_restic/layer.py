"""A snapshot's image as a layer, over either way to its segments: the repository's format, or `restic mount`."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import BaseLayer, CutLayer
from blockferry_restic.format import Rows
from blockferry_restic.segments import VOLUME_DIRECTORY, directory_name, segment_name

_CACHE_BYTES = 64 << 20
_READERS = min(4, os.cpu_count() or 1)
"""Threads that read ahead: decryption, decompression and reads let go of the interpreter's lock."""
_READ_THROUGH = 16 << 10
"""Gaps between extents that are cheaper to read than to leave out, in bytes."""
_MOST_OPEN = 64


class ReadAheadLayer(CutLayer):
    """Some extents of another layer, streamed by several threads that read ahead."""

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Yield `(offset, bytes)` in order; at most twice as many batches as threads are in memory."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="restic-read") as pool:
            ahead: collections.deque[Future[list[tuple[int, memoryview]]]] = collections.deque()
            try:
                for piece in extents.batches(batch):
                    ahead.append(pool.submit(self._read, piece))
                    if len(ahead) >= 2 * _READERS:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, extents: ExtentSet) -> list[tuple[int, memoryview]]:
        """Return the bytes of a few extents, read in as few steps as makes sense."""
        pieces = []
        for start, length in extents.coalesce(_READ_THROUGH):
            buffer = memoryview(bytearray(length))
            self.read_into(start, buffer)
            inside = extents.clip(start, start + length)
            pieces += [(offset, buffer[offset - start : offset - start + size]) for offset, size in inside]
        return pieces


class BlobImage(BaseLayer):
    """The segments of a snapshot, put together from the repository's blobs.

    `starts` are the offsets in the image at which blobs begin, sorted, `rows` says by what number `load` knows each:
    16 bytes a blob. What lies between segments reads as zero.
    """

    def __init__(
        self, load: Callable[[int], bytes], size: int, extents: ExtentSet, starts: Offsets, rows: Rows
    ) -> None:
        self.size = size
        self.extents = extents
        self._starts = starts
        self._rows = rows
        self._cache = BlobCache(load, _CACHE_BYTES)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the blobs that overlap it."""
        end = offset + len(buffer)
        if not self.extents.covers(offset, end):
            buffer[:] = bytes(len(buffer))
        first = max(0, int(np.searchsorted(self._starts, offset, side="right")) - 1)
        last = int(np.searchsorted(self._starts, end, side="left"))
        for start, row in zip(self._starts[first:last].tolist(), self._rows[first:last].tolist(), strict=True):
            blob = memoryview(self._cache.get(row))
            piece = blob[max(0, offset - start) : end - start]
            place = max(0, start - offset)
            buffer[place : place + len(piece)] = piece


class MountedImage(BaseLayer):
    """The segments of a snapshot, read from the files that `restic mount` shows; `close` ends the mount."""

    def __init__(self, root: Path, size: int, unit: int, numbers: Offsets, held: contextlib.ExitStack) -> None:
        """Take the snapshot's directory in the mount, the numbers of the segments in it, and what to let go of."""
        self.size = size
        self.extents = ExtentSet.from_ranges(numbers * unit, np.minimum((numbers + 1) * unit, size))
        self._volume = root / VOLUME_DIRECTORY
        self._unit = unit
        self._held = held
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, _Descriptor] = collections.OrderedDict()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the segments that overlap it."""
        if not self.extents.covers(offset, offset + len(buffer)):
            buffer[:] = bytes(len(buffer))
        for start, length in self.extents.clip(offset, offset + len(buffer)):
            position, end = start, start + length
            while position < end:
                number, within = divmod(position, self._unit)
                count = min(self._unit - within, end - position)
                self._read_segment(number, within, buffer[position - offset : position - offset + count])
                position += count

    def close(self) -> None:
        """Close the files and take the mount away."""
        with self._lock:
            self._open.clear()
        self._held.close()

    def _read_segment(self, number: int, within: int, buffer: memoryview) -> None:
        """Fill the buffer from one segment; restic authenticates what it serves, and fails the read otherwise."""
        file = self._descriptor(number)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(file.number, [buffer[done:]], within + done)
            except OSError as error:
                raise _unreadable(number * self._unit, error.strerror or "the read failed") from None
            if not count:
                raise _unreadable(number * self._unit, "it ends early")
            done += count

    def _descriptor(self, number: int) -> _Descriptor:
        """Return an open segment; those that were not used for longest are let go of."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                path = self._volume / directory_name(number) / segment_name(number, self._unit)
                try:
                    file = self._open[number] = _Descriptor(path)
                except OSError as error:
                    raise _unreadable(number * self._unit, error.strerror or "it cannot be opened") from None
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return file


class BlobCache:
    """The blobs that were used last, in a bounded number of bytes; a blob that two threads want is read once."""

    def __init__(self, load: Callable[[int], bytes], capacity: int) -> None:
        self._load = load
        self._capacity = capacity
        self._lock = threading.Lock()
        self._blobs: collections.OrderedDict[int, Future[bytes]] = collections.OrderedDict()
        self._bytes = 0

    def get(self, row: int) -> bytes:
        """Return a blob; raise what reading it raises. Another try reads it again."""
        with self._lock:
            future = self._blobs.get(row)
            mine = future is None
            if future is None:
                future = self._blobs[row] = concurrent.futures.Future()
            self._blobs.move_to_end(row)
        if mine:
            self._fill(row, future)
        return future.result()

    def _fill(self, row: int, future: Future[bytes]) -> None:
        """Read a blob for everybody who waits for it, and drop what no longer fits."""
        try:
            blob = self._load(row)
        except BaseException as error:
            with self._lock:
                del self._blobs[row]
            future.set_exception(error)
            return
        future.set_result(blob)
        with self._lock:
            self._bytes += len(blob)
            for oldest in list(self._blobs):
                if self._bytes <= self._capacity:
                    break
                if oldest != row and self._blobs[oldest].done():
                    self._bytes -= len(self._blobs.pop(oldest).result())


class _Descriptor:
    """An open file that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _unreadable(offset: int, reason: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(
        f"the segment at {offset} cannot be read: {reason}",
        remedy="Is the repository reachable? `restic check --read-data` tells whether it is sound.",
    )
