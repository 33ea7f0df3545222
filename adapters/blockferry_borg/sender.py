"""Sending items to a worker: what is to be stored is read while the worker compresses what came before."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Final

from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer, Layer
from blockferry.repository import Advance
from blockferry_borg.client import BATCH, SLOTS, Worker

_MOST_RUNS: Final = 4096
"""Runs of a frame at most: a line of about 100 KiB."""


class Sender:
    """Cuts a block map's runs into frames, and fills the worker's slots with the data among them."""

    def __init__(self, worker: Worker, unit: int) -> None:
        """Send to a worker that is about to store an archive in chunks of `unit` bytes."""
        self._worker = worker
        self._capacity = max(BATCH // unit, 1) * unit
        self._free = collections.deque(range(SLOTS))
        self._slot: int | None = None
        self._filled = 0
        self._runs: list[tuple[str, int] | tuple[str, int, int]] = []

    def send_item(
        self, path: str, source: Layer, block_map: BlockMap, bases: Sequence[ExtentSet] = (), *, advance: Advance
    ) -> None:
        """Send an item whose map is one of whole chunks; `bases` says which base has what of the chunks that are same.

        Raise what `source` or the worker raises.
        """
        self._worker.send(item=path, size=block_map.size)
        for start, length, kind in block_map:
            if kind is Kind.DATA:
                self._send_data(source, start, length, advance)
            elif kind is Kind.SAME:
                for number, taken in _shares(start, length, bases):
                    self._add((kind.name.lower(), taken, number))
            else:
                self._add((kind.name.lower(), length))
        self._flush()

    def finish(self) -> int:
        """Wait until the worker has taken everything and committed; return the bytes by which the repository grew."""
        while len(self._free) < SLOTS:
            self._reclaim()
        stored: int = self._worker.ask(end=True)["stored"]
        return stored

    def _send_data(self, source: Layer, start: int, length: int, advance: Advance) -> None:
        """Read a run of data, as much at a time as there is room for."""
        end = start + length
        while start < end:
            if self._slot is None:
                self._slot = self._take_slot()
            piece = min(self._capacity - self._filled, end - start)
            source.read_into(start, self._worker.slot(self._slot)[self._filled : self._filled + piece])
            self._filled += piece
            self._add((Kind.DATA.name.lower(), piece))
            if self._filled == self._capacity:
                self._flush()
            start += piece
            advance(piece)

    def _add(self, run: tuple[str, int] | tuple[str, int, int]) -> None:
        self._runs.append(run)
        if len(self._runs) == _MOST_RUNS:
            self._flush()

    def _flush(self) -> None:
        """Hand over the runs that were gathered, and the slot with their data."""
        if self._runs:
            self._worker.send(runs=self._runs, slot=self._slot)
        self._runs, self._slot, self._filled = [], None, 0

    def _take_slot(self) -> int:
        """Return a slot that the worker is done with."""
        while not self._free:
            self._reclaim()
        return self._free.popleft()

    def _reclaim(self) -> None:
        self._free.append(self._worker.receive()["free"])


def _shares(start: int, length: int, bases: Sequence[ExtentSet]) -> Iterator[tuple[int, int]]:
    """Yield, in order, (number of a base, bytes) for a run that several bases have; they do not overlap."""
    parts = [
        (place, number, taken) for number, base in enumerate(bases) for place, taken in base.clip(start, start + length)
    ]
    for _place, number, taken in sorted(parts):
        yield number, taken


class Content(BaseLayer):
    """Bytes in memory as a layer."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.extents = ExtentSet.whole(self.size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy from the content."""
        buffer[:] = self.content[offset : offset + len(buffer)]
