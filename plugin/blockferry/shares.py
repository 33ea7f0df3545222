"""The shares of a set as one layer: they are disjoint, each is a snapshot by itself, and there may be hundreds.

Where a repository lets that be done at any time, a share is opened when something of it is read, and those that were
not read for longest are closed again. Elsewhere all are open from the beginning: whoever writes to the repository
meanwhile, as a merge does itself, would not let another be opened.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer, Layer

_MOST_OPEN = 4
"""Shares that stay open: who reads in order needs one, who reads here and there some more."""


@dataclasses.dataclass
class _Opened:
    layer: Layer
    users: int = 0


class SharesLayer(BaseLayer):
    """Disjoint layers side by side. May be read from several threads if they may."""

    def __init__(self, shares: Sequence[tuple[ExtentSet, Callable[[], Layer]]], size: int, *, when_read: bool) -> None:
        """Take what each share has, and what opens it: when it is read, few at a time, in any thread; or all, now."""
        self.size = size
        self.extents = ExtentSet.empty().union(*(extents for extents, _open in shares))
        self._openers = [opener for _extents, opener in shares]
        self._starts = np.concatenate([np.empty(0, np.int64), *(extents.starts for extents, _open in shares)])
        self._ends = np.concatenate([np.empty(0, np.int64), *(extents.ends for extents, _open in shares)])
        self._owners = np.repeat(np.arange(len(shares)), [len(extents) for extents, _open in shares])
        order = np.argsort(self._starts, kind="stable")
        self._starts, self._ends, self._owners = self._starts[order], self._ends[order], self._owners[order]
        self._lock = threading.Lock()
        self._opened: collections.OrderedDict[int, _Opened] = collections.OrderedDict()
        self._most = _MOST_OPEN if when_read else len(shares)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            for owner in range(0 if when_read else len(shares)):
                self._opened[owner] = _Opened(self._openers[owner]())
            on_failure.pop_all()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the shares that have it."""
        end = offset + len(buffer)
        if not self.extents.covers(offset, end):
            buffer[:] = bytes(len(buffer))
        for owner, mine in self._by_owner(ExtentSet.from_pairs([(offset, len(buffer))])):
            with self._borrowed(owner) as layer:
                for start, length in mine:
                    layer.read_into(start, buffer[start - offset : start - offset + length])

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Have share after share stream what it has; what none has reads as zero, piece by piece."""
        if extents.difference(self.extents):
            yield from super().stream(extents, batch)
            return
        for owner, mine in self._by_owner(extents):
            with self._borrowed(owner) as layer:
                yield from layer.stream(mine, batch)

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            opened, self._opened = self._opened, collections.OrderedDict()
        for each in opened.values():
            each.layer.close()

    def _by_owner(self, extents: ExtentSet) -> Iterator[tuple[int, ExtentSet]]:
        """Yield, in order, (a share, extents that it has), as many at a time as no other share has any between."""
        first, last = self._touched(extents)
        pieces = ExtentSet(self._starts[first:last], self._ends[first:last])
        owners = self._owners[first:last]
        edges = np.flatnonzero(np.diff(owners)) + 1
        for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(pieces)], strict=True):
            if begin < end and (mine := extents.intersection(pieces[begin:end])):
                yield int(owners[begin]), mine

    def _touched(self, extents: ExtentSet) -> tuple[int, int]:
        """Return between which positions of our runs the extents lie."""
        if not extents:
            return 0, 0
        first = int(np.searchsorted(self._ends, int(extents.starts[0]), side="right"))
        return first, int(np.searchsorted(self._starts, extents.end, side="left"))

    @contextlib.contextmanager
    def _borrowed(self, owner: int) -> Iterator[Layer]:
        """Lend a share's layer, opened if it is not."""
        with self._lock:
            if owner not in self._opened:
                self._opened[owner] = _Opened(self._openers[owner]())
            lent = self._opened[owner]
            self._opened.move_to_end(owner)
            lent.users += 1
            surplus = self._take_surplus()
        try:
            for layer in surplus:
                layer.close()
            yield lent.layer
        finally:
            with self._lock:
                lent.users -= 1

    def _take_surplus(self) -> list[Layer]:
        """Return the layers that are to be closed: those used longest ago, but none that is in use."""
        idle = [owner for owner, each in self._opened.items() if not each.users]
        return [self._opened.pop(owner).layer for owner in idle[: max(0, len(self._opened) - self._most)]]
