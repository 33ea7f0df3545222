"""A buffer for what one host writes: it acknowledges before the volume does, and is of bounded size.

For volumes of which each host uses a part of its own. Other hosts see a write only when it has been passed on, which is
soon, and at the latest when `sync` returns.
"""

from __future__ import annotations

import threading

from blockferry.cluster.guard import Logged
from blockferry.errors import BlockferryError

_BLOCK = 4096
_TOGETHER = 1 << 20
"""Bytes that are passed on by one write, where blocks follow each other."""


class WriteBack:
    """A volume with a buffer in front of it, which a thread empties in the order of the disk."""

    def __init__(self, below: Logged, most: int) -> None:
        """Hold back at most so many bytes."""
        self.size = below.size
        self.failure: BlockferryError | None = None
        """Why something that was acknowledged is not on the volume: every later write and sync says so."""
        self._below, self._most = below, max(most, 2 * _TOGETHER)
        self._turn = threading.Condition()
        self._dirty: dict[int, bytes] = {}
        """By number of block, what is to be passed on; the newest wins."""
        self._leaving: dict[int, bytes] = {}
        """What is being passed on."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="write back", daemon=True)
        self._thread.start()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read from the volume, and from the buffer what is newer."""
        first, end = offset // _BLOCK, -(-(offset + len(buffer)) // _BLOCK)
        with self._turn:
            # Taken before the volume is read: what leaves the buffer meanwhile is seen here or there.
            newer = [(each, self._newest(each)) for each in range(first, end)] if self._dirty or self._leaving else []
        self._below.read_into(offset, buffer)
        for number, data in newer:
            if data is not None:
                start, stop = max(number * _BLOCK, offset), min((number + 1) * _BLOCK, offset + len(buffer))
                buffer[start - offset : stop - offset] = data[start - number * _BLOCK : stop - number * _BLOCK]

    def write(self, offset: int, data: memoryview) -> None:
        """Take whole blocks into the buffer, when there is room; pass on anything else behind what is there."""
        if offset % _BLOCK or len(data) % _BLOCK:
            self.flush()
            self._below.write(offset, data)
            return
        whole = bytes(data)
        for start in range(0, len(whole), _TOGETHER):
            piece = whole[start : start + _TOGETHER]
            first = (offset + start) // _BLOCK
            with self._turn:
                self._turn.wait_for(lambda: self._held() <= self._most - _TOGETHER or self.failure)
                self._raise_failure()
                for place in range(0, len(piece), _BLOCK):
                    self._dirty[first + place // _BLOCK] = piece[place : place + _BLOCK]
                self._turn.notify_all()

    def zero(self, offset: int, length: int) -> None:
        """Discard behind what is in the buffer."""
        self.flush()
        self._below.zero(offset, length)

    def flush(self) -> None:
        """Return when all that was acknowledged is on the volume; raise what failed."""
        with self._turn:
            self._turn.wait_for(lambda: not self._held() or self.failure)
            self._raise_failure()

    def sync(self) -> None:
        """Return when it is durable, too."""
        self.flush()
        self._below.sync()

    def close(self) -> None:
        """Pass on what is there, and end."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join()
        self.sync()

    def _held(self) -> int:
        return (len(self._dirty) + len(self._leaving)) * _BLOCK

    def _newest(self, number: int) -> bytes | None:
        return self._dirty.get(number) or self._leaving.get(number)

    def _raise_failure(self) -> None:
        if self.failure:
            raise BlockferryError(self.failure.message, remedy=self.failure.remedy)

    def _run(self) -> None:
        """Pass on what is there, all of it at a time, in the order of the disk."""
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._dirty or self._closed)
                if not self._dirty:
                    return
                self._leaving, self._dirty = self._dirty, {}
            try:
                self._pass_on()
            except BlockferryError as error:
                self.failure = error
            with self._turn:
                self._leaving = {}
                self._turn.notify_all()
                if self.failure:
                    return

    def _pass_on(self) -> None:
        run: list[int] = []
        for number in [*sorted(self._leaving), -1]:
            if run and (number != run[-1] + 1 or len(run) * _BLOCK >= _TOGETHER):
                self._below.write(run[0] * _BLOCK, memoryview(b"".join(self._leaving[each] for each in run)))
                run = []
            run.append(number)
