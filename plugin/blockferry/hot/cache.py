"""The restore cache: a volume that is the target where a block is there, and the repository where it is not yet.

    block     read comes from   write                          hydration
    absent    the repository    whole blocks: to the target,   writes the repository's bytes to the target,
                                becomes dirty; a part of a     becomes present
                                block: the rest is fetched
                                first and written with it
    present   the target        to the target, becomes dirty   leaves it alone
    dirty     the target        to the target                  leaves it alone

No block ever becomes absent again. A discarded block was written: with zeros.

- A write is on the target, not in some buffer of ours, when it returns, and durable when `sync` returns: first the
  target is made so, then the map (`state.py`). After a crash a block that the map does not have is absent: what was
  written to it, and never synced, is lost, as it may be on any disk. The old content of a block that was synced never
  comes back, because the map only ever grows.
- Hydration and writes to an absent block exclude each other by the lock of the block's unit, and hydration looks at
  the map again under that lock: what was written meanwhile stays. A unit that is whole needs no lock any more.
- Nobody waits for the repository while holding a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from blockferry.errors import BlockferryError
from blockferry.hot.activity import Activity
from blockferry.hot.attachment import Attachment
from blockferry.hot.source import Source
from blockferry.hot.state import Bits, StateMap, runs
from blockferry.hot.target import HotTarget

log = logging.getLogger(__name__)

Bytes = bytes | memoryview

LOCKS = 64
"""Unit N has lock N % LOCKS."""
_WRITTEN_THROUGH = 64 << 10
"""Gaps between what the snapshot used that are cheaper to write zeros to than to leave out, in bytes."""
_AHEAD = 16 << 20
"""How many bytes are fetched ahead of somebody who reads in sequence, and around who does not."""
_WAITING_TO_BE_WRITTEN = 16
"""Units that were read for somebody and are not on the target yet; more make the readers wait."""


class RestoreCache(Protocol):
    """What a hot restore's disk is made of. Used by several threads; errors are BlockferryError."""

    size: int
    writable: bool

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, and give back its space where that can be done."""

    def sync(self) -> None:
        """Make all that was written durable."""

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says of it, sizes in bytes; `total` is what was to be brought in."""

    def close(self) -> None:
        """Make all durable and let go of files."""


class TargetCache:
    """A restore cache whose blocks end up on the target. Implements `RestoreCache`."""

    writable = True

    def __init__(
        self, source: Source, target: HotTarget, state: StateMap, about: Attachment, *, zeros_are_content: bool
    ) -> None:
        """Put `target` over `source`. What nobody uses becomes zeros if `zeros_are_content`, or where it costs little.

        `source.unit` is a multiple of eight blocks; `about` says what is restored where.
        """
        self.about = about
        self.source, self.target, self.state = source, target, state
        self.size = source.size
        self.unit = source.unit
        self.ahead = max(_AHEAD // source.unit, 1)
        """Units that are fetched early for somebody who reads in sequence."""
        self.activity = Activity()
        self._zeros_are_content = zeros_are_content
        self._used = source.used.coalesce(_WRITTEN_THROUGH)
        self._whole = state.whole(self.unit)
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._fetched: queue.Queue[int | None] = queue.Queue(_WAITING_TO_BE_WRITTEN)
        self._unwritten: dict[int, memoryview] = {}
        self._keeper = threading.Thread(target=self._keep_fetched, name="hot keep", daemon=True)
        self._keeper.start()

    # -- the disk's user -----------------------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the target, and from the repository what is not there yet."""
        self.activity.note()
        for start, piece in by_unit(offset, buffer, self.unit):
            number = start // self.unit
            if self.activity.reads_on(number) and self._lacks_after(number):
                self.activity.will_follow(number)
            if self._whole[number]:
                self.target.read_into(start, piece)
            else:
                self._read_part(start, piece)

    def write(self, offset: int, data: memoryview) -> None:
        """Write to the target, with the rest of blocks that it had not."""
        self.activity.note()
        for start, piece in by_unit(offset, data, self.unit):
            if self._whole[start // self.unit]:
                self.target.write(start, piece)
            else:
                self._write_part(start, len(piece), piece)
            self._mark(self.state.dirty, start, len(piece))

    def zero(self, offset: int, length: int) -> None:
        """Discard: the range reads as zeros from now on."""
        self.activity.note()
        end = offset + length
        while offset < end:
            stop = min((offset // self.unit + 1) * self.unit, end)
            if self._whole[offset // self.unit]:
                self.target.zero(offset, stop - offset, must=True)
            else:
                self._write_part(offset, stop - offset, None)
            self._mark(self.state.dirty, offset, stop - offset)
            offset = stop

    def sync(self) -> None:
        """Make the target durable, and then the map."""
        self.state.sync(self.target.sync)

    def fill_unused(self, first: int, end: int) -> None:
        """Make zeros of what is absent of units `[first, end)`, in which the snapshot has nothing."""
        with contextlib.ExitStack() as held:
            # Nobody else takes more than one: in the order of the locks there is no deadlock.
            for index in sorted({number % LOCKS for number in range(first, end)}):
                held.enter_context(self._locks[index])
            start, stop = first * self.unit, min(end * self.unit, self.size)
            for offset, size, there in self._runs(start, stop - start):
                if not there:
                    self._free(offset, offset + size)
            self._mark(self.state.present, start, stop - start)
            self._whole[first:end] = bytes([1]) * (end - first)

    def status(self) -> dict[str, Any]:
        """Return how far it is: `dirty` is what was written to since the restore began."""
        absent = (self.state.present.count - self.state.present.total) * self.state.block
        return {
            "target": self.about.target,
            "total": self.about.total,
            "hydrated": self.about.total - absent,
            "dirty": self.state.dirty.total * self.state.block,
            "finished": self.about.finished,
            "failure": self.target.failure,
        }

    def finish(self) -> None:
        """Make the target, of which nothing is absent any more, the volume by itself, and remember that it is."""
        self.sync()
        self.about = dataclasses.replace(self.about, finished=True)
        self.target.finish(self.about.save)

    def write_through(self) -> None:
        """Have all that was written, and each write from now on, on the target's disk when it returns."""
        self.target.write_through()

    def close(self) -> None:
        """Write what was fetched for somebody, make all durable, and let go of the map."""
        self._fetched.put(None)
        self._keeper.join()
        try:
            if not self.target.is_gone():  # why we end is that, not that it cannot be written to
                self.sync()
        finally:
            self.state.close()

    # -- hydration -----------------------------------------------------------------------------------------------------

    def next_missing(self, number: int) -> int:
        """Return the first unit from `number` on that is not whole; -1 if there is none."""
        return self._whole.find(0, number)

    def is_whole(self, number: int) -> bool:
        """Tell whether all of a unit is on the target."""
        return bool(self._whole[number])

    def is_coming(self, number: int) -> bool:
        """Tell whether a unit was fetched for somebody, and is about to be written."""
        return number in self._unwritten

    def is_used(self, number: int) -> bool:
        """Tell whether the snapshot has anything in a unit."""
        return bool(self.source.used.clip(number * self.unit, (number + 1) * self.unit))

    def fill(self, number: int, content: memoryview) -> None:
        """Write what is absent of a unit, of which the repository has `content`."""
        start, length = number * self.unit, self.source.length(number)
        with self._lock(number):
            if self._whole[number]:
                return
            for first, size, there in self._runs(start, length):
                if not there:
                    self._fill_run(first, content[first - start : first - start + size])
            self._mark(self.state.present, start, length)
            self._whole[number] = 1

    def _lacks_after(self, number: int) -> bool:
        """Tell whether anything of what somebody who reads on is about to need is not there."""
        return self._whole.find(0, number + 1, number + 1 + self.ahead) >= 0

    # -- within a unit -------------------------------------------------------------------------------------------------

    def _read_part(self, offset: int, buffer: memoryview) -> None:
        """Read some of one unit, which is not whole."""
        content: memoryview | None = None
        number = offset // self.unit
        for first, size, there in self._runs(offset, len(buffer)):
            place = buffer[first - offset : first - offset + size]
            if there:
                self.target.read_into(first, place)
                continue
            if content is None:
                content = self._fetch(number)
            place[:] = content[first - number * self.unit : first - number * self.unit + size]

    def _fetch(self, number: int) -> memoryview:
        """Return a unit for somebody who waits for it, and have it written to the target."""
        content = self._unwritten.get(number)
        if content is None:
            self.activity.missed(number)
            content = self._unwritten[number] = self._get(number)
            self._fetched.put(number)
        return content

    def _get(self, number: int) -> memoryview:
        with self.activity.fetching():
            return self.source.get(number)

    def _write_part(self, offset: int, length: int, data: memoryview | None) -> None:
        """Write some of one unit, which was not whole; None: zeros."""
        number, block = offset // self.unit, self.state.block
        stop = offset + length
        start, end = offset // block * block, min(-(-stop // block) * block, self.size)
        torn = [(start, offset), (stop, end)]  # what is left of the first and of the last block
        lacking = any(last > first and not self._has(first) for first, last in torn)
        content = (self._unwritten.get(number) or self._get(number)) if lacking else memoryview(b"")
        with self._lock(number):
            # What is absent may have become present meanwhile, never the other way: `content` has what is lacking.
            before, after = (
                content[first % self.unit : first % self.unit + last - first] if not self._has(first) else b""
                for first, last in torn
            )
            self._write_joined(offset, length, before, data, after)
            self._mark(self.state.present, start, end - start)
            self._whole[number] = self._has_all(number)

    def _write_joined(self, offset: int, length: int, before: Bytes, data: memoryview | None, after: Bytes) -> None:
        """Write data, or zeros, at `offset`, with what lies before and after it."""
        if data is None:
            self.target.zero(offset, length, must=True)
            for place, piece in ((offset - len(before), before), (offset + length, after)):
                if piece:
                    self.target.write(place, memoryview(piece))
        elif before or after:
            self.target.write(offset - len(before), memoryview(b"".join((before, data, after))))
        else:
            self.target.write(offset, data)

    def _fill_run(self, start: int, content: memoryview) -> None:
        """Write a run of absent blocks: what the snapshot used, and zeros for the rest."""
        position, end = start, start + len(content)
        for first, length in self._used.clip(start, end):
            self._free(position, first)
            self.target.write(first, content[first - start : first - start + length])
            position = first + length
        self._free(position, end)

    def _free(self, start: int, end: int) -> None:
        """See to it that a range that nobody used reads as zeros, if it has to, or if that is easily done."""
        if end > start and not self.target.blank:
            self.target.zero(start, end - start, must=self._zeros_are_content)

    def _keep_fetched(self) -> None:
        """Write what was fetched for readers to the target, behind their backs."""
        while (number := self._fetched.get()) is not None:
            try:
                if number in self._unwritten:
                    self.fill(number, self._unwritten[number])
            except BlockferryError as error:  # it stays absent, and hydration meets the same error
                log.warning("%s", error.message)
            except Exception:  # without this thread every reader would wait for ever
                log.exception("unit %d could not be kept", number)
            self._unwritten.pop(number, None)

    # -- the map -------------------------------------------------------------------------------------------------------

    def _lock(self, number: int) -> threading.Lock:
        return self._locks[number % LOCKS]

    def _has(self, offset: int) -> bool:
        """Tell whether the block that a byte is in is on the target; what lies beyond the end is."""
        number = offset // self.state.block
        return offset >= self.size or self.state.present.all(number, number + 1)

    def _has_all(self, number: int) -> bool:
        start = number * self.unit
        return self.state.present.all(*self._blocks(start, self.source.length(number)))

    def _mark(self, bits: Bits, offset: int, length: int) -> None:
        bits.set(*self._blocks(offset, length))

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """Return the first and the end of the blocks that a range touches."""
        return offset // self.state.block, -(-(offset + length) // self.state.block)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, present) of the runs of a range."""
        first, last = self._blocks(offset, length)
        for begin, stop, there in runs(self.state.present.mask(first, last), last - first):
            start = max((first + begin) * self.state.block, offset)
            yield start, min((first + stop) * self.state.block, offset + length) - start, there


def by_unit(offset: int, view: memoryview, unit: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of a range, cut where units end."""
    position = 0
    while position < len(view):
        start = offset + position
        count = min(unit - start % unit, len(view) - position)
        yield start, view[position : position + count]
        position += count
