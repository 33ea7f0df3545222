"""The restore cache without a target: the latest units that somebody read, in a file of bounded size; read-only.

    unit       read comes from                            becomes
    absent     the repository: who asks first brings it   coming
    coming     the repository: who asks meanwhile waits   held when it is in the file; absent if it cannot be had, or
               for the same bytes                         if there is no room for it
    held       the file                                   absent when it is the one that nobody has read for longest,
                                                          and another needs its slot

What the snapshot has nothing in is zeros, and takes no slot.

- The file is one without a name, in the user's directory: it is gone with us, whatever we die of. It has slots of one
  unit each, as many as the user's size holds, so that it never grows beyond that.
- A unit that somebody is reading keeps its slot. Where all are being read, and where the filesystem is full, a unit is
  handed to those who wait for it and not kept: a buffer that fails makes reads slow, not wrong, and never fails them.
- Nobody waits for the repository, or for the file, while holding the lock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from blockferry.errors import BlockferryError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import CacheOptions, hookimpl
from blockferry.hot import attachment
from blockferry.hot.cache import RestoreCache, by_unit
from blockferry.hot.source import Source

log = logging.getLogger(__name__)

FEWEST = 4
"""Slots below which a buffer is of no use: a reader and those beside it would only drive out each other's units."""
_TRY_FULL_AGAIN = 60.0
"""Seconds after which a filesystem that was full is worth another look."""


@hookimpl
def blockferry_restore_cache(
    source: Source, options: CacheOptions
) -> contextlib.AbstractContextManager[RestoreCache] | None:
    """Return the cache of a restore that has no target."""
    return _cache(source, options) if options.buffer and not options.target else None


@contextlib.contextmanager
def _cache(source: Source, options: CacheOptions) -> Iterator[RestoreCache]:
    if known := attachment.load(options.name):
        raise UsageError(
            f"{options.name}: is a restore of snapshot {known.snapshot} onto {known.target} already",
            remedy="Give this one another --name.",
        )
    slots = options.buffer_size // source.unit
    if slots < FEWEST:
        raise UsageError(
            f"a buffer of {options.buffer_size} bytes is too small: the snapshot is in units of {source.unit} bytes",
            remedy=f"Say --size {FEWEST * source.unit >> 10}K or more.",
        )
    try:
        file = tempfile.TemporaryFile(dir=options.buffer, buffering=0)  # noqa: SIM115  # only to be made may fail
    except OSError as error:
        raise BlockferryError(
            f"{options.buffer}: no buffer can be made there: {error.strerror}",
            remedy="Name a directory that you can write to, on a filesystem with room.",
        ) from None
    with file:
        yield BufferCache(source, file.fileno(), slots, directory=options.buffer)


@dataclasses.dataclass
class _Unit:
    """A unit that is coming or held."""

    slot: int = -1
    """Where in the file; -1: nowhere."""
    readers: int = 1
    arriving: Future[memoryview] | None = dataclasses.field(default_factory=Future)
    """Its bytes, until they are in the slot."""


class BufferCache:
    """A restore cache of the units that were read last. Implements `RestoreCache`."""

    writable = False

    def __init__(self, source: Source, descriptor: int, slots: int, *, directory: str) -> None:
        """Borrow an empty file, to be filled with at most so many units."""
        self.source = source
        self.size = source.size
        self.unit = source.unit
        self.slots = slots
        self._directory = directory
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._units: collections.OrderedDict[int, _Unit] = collections.OrderedDict()  # read last: at the end
        self._free = list(range(slots - 1, -1, -1))
        self._full_until = 0.0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the file, and from the repository what is not in there."""
        for start, piece in by_unit(offset, buffer, self.unit):
            number = start // self.unit
            if self._used_of(number):
                self._read_unit(number, start % self.unit, piece)
            else:
                piece[:] = bytes(len(piece))

    def write(self, offset: int, data: memoryview) -> None:
        """Refuse."""
        raise BlockferryError("a restore without a target is read-only")

    def zero(self, offset: int, length: int) -> None:
        """Refuse."""
        raise BlockferryError("a restore without a target is read-only")

    def sync(self) -> None:
        """Have nothing to make durable."""

    def status(self) -> dict[str, Any]:
        """Return how much of what the snapshot uses is in the buffer now."""
        with self._lock:
            held = [number for number, unit in self._units.items() if unit.slot >= 0]
        return {
            "target": "",
            "buffer": self._directory,
            "buffer_size": self.slots * self.unit,
            "total": self.source.used.total,
            "hydrated": sum(self._used_of(number).total for number in held),
            "dirty": 0,
            "finished": False,
        }

    def close(self) -> None:
        """Have nothing to let go of: the file is its owner's."""

    # -- a unit --------------------------------------------------------------------------------------------------------

    def _used_of(self, number: int) -> ExtentSet:
        return self.source.used.clip(number * self.unit, (number + 1) * self.unit)

    def _read_unit(self, number: int, start: int, piece: memoryview) -> None:
        """Read some of one unit, which nobody evicts meanwhile."""
        with self._lock:
            unit = self._units.get(number)
            mine = unit is None
            if unit is None:
                unit = self._units[number] = _Unit()
            else:
                unit.readers += 1
                self._units.move_to_end(number)
            arriving = unit.arriving
        try:
            if mine:
                self._bring(number, unit)
            if arriving is None:
                self._read_slot(number, unit.slot, start, piece)
            else:
                piece[:] = arriving.result()[start : start + len(piece)]
        finally:
            with self._lock:
                unit.readers -= 1

    def _bring(self, number: int, unit: _Unit) -> None:
        """Fetch a unit for all who wait for it, and keep it if there is room."""
        assert unit.arriving is not None  # noqa: S101  # only who made the entry is here
        try:
            content = self.source.get(number)
        except BaseException as error:
            with self._lock:
                del self._units[number]
            unit.arriving.set_exception(error)
            return
        unit.arriving.set_result(content)
        slot = self._take_slot()
        kept = slot >= 0 and self._write_slot(slot, content)
        with self._lock:
            if kept:
                unit.slot, unit.arriving = slot, None
                return
            del self._units[number]
            if slot >= 0:
                self._free.append(slot)

    def _take_slot(self) -> int:
        """Return an empty slot, or else that of the unit that nobody has read for longest; -1 if there is none."""
        with self._lock:
            if self._free and time.monotonic() >= self._full_until:
                return self._free.pop()
            for number, unit in self._units.items():
                if unit.slot >= 0 and not unit.readers:
                    del self._units[number]
                    return unit.slot
        return -1

    def _write_slot(self, slot: int, content: memoryview) -> bool:
        """Write a unit to the file; return whether that could be done."""
        place = slot * self.unit
        try:
            while content:
                count = os.pwrite(self._descriptor, content, place)
                place, content = place + count, content[count:]
        except OSError as error:
            self._full_until = time.monotonic() + _TRY_FULL_AGAIN
            log.warning("%s: what was fetched cannot be kept: %s", self._directory, error.strerror)
            return False
        return True

    def _read_slot(self, number: int, slot: int, start: int, piece: memoryview) -> None:
        """Read some of a unit from the file; from the repository if that cannot be done."""
        done, place = 0, slot * self.unit + start
        try:
            while done < len(piece):
                count = os.preadv(self._descriptor, [piece[done:]], place + done)
                if not count:
                    raise OSError(0, "it ends too early")
                done += count
        except OSError as error:
            log.warning("%s: the buffer cannot be read: %s", self._directory, error.strerror)
            piece[:] = self.source.get(number)[start : start + len(piece)]
