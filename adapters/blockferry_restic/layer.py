"""A snapshot's image as a layer, put together from the repository's blobs, and read ahead by several threads."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import BaseLayer, CutLayer
from blockferry_restic.format import Rows

_CACHE_BYTES = 64 << 20
_READERS = min(4, os.cpu_count() or 1)
"""Threads that read ahead: decryption, decompression and reads let go of the interpreter's lock."""
_READ_THROUGH = 16 << 10
"""Gaps between extents that are cheaper to read than to leave out, in bytes."""


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
