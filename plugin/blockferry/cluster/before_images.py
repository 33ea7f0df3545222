"""What one host does for one epoch: before a chunk is overwritten for the first time, its image is made durable.

    read the chunk -> claim it in the index, for all hosts -> if it is ours: log it, durably -> overwrite it

Reading comes before claiming. Whoever gets a chunk has read it before anybody else was told that it is taken, and
nobody overwrites a chunk before being told that, or that it is theirs: so what was read is the image at the instant.
Who does not get it need not wait for the other's log: if that host fails to log it the epoch is void, and says so.

Writers wait here for a thread that claims and logs whatever came together meanwhile: one round trip, one sync.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Sequence

import numpy as np

from blockferry.cluster.index import LogIndex
from blockferry.cluster.log_writer import LogWriter
from blockferry.cluster.shared_device import SharedDevice
from blockferry.errors import BlockferryError, EpochClosedError

log = logging.getLogger(__name__)

_AT_ONCE = 256
"""Chunks that one writer brings at a time: a discard can be of any length."""


class BeforeImages:
    """The images that this host logs in one epoch. Used by several threads at once.

    Nothing here fails a write: what goes wrong is in `failure`, and from then on writes pass as if there was no epoch.
    """

    def __init__(self, device: SharedDevice, index: LogIndex, claims: str, host: str, writer: LogWriter) -> None:
        self.failure = ""
        self.bytes_logged = 0
        """How much is in this host's log."""
        self._device, self._index, self._writer = device, index, writer
        self._claims, self._host = claims, host
        self._chunk = writer.chunk
        self._settled = bytearray(-(-device.size // self._chunk))
        """By chunk: 1 if it may be overwritten."""
        self._turn = threading.Condition()
        self._pending: dict[int, _Batch] = {}
        self._waiting = _Batch()
        self._ended = False
        self._memory: list[memoryview] = []
        """Of chunks that were logged, to be used again: page-aligned."""
        self._thread = threading.Thread(target=self._run, name="before images", daemon=True)
        self._thread.start()

    def save(self, offset: int, length: int) -> None:
        """Return when a range may be overwritten."""
        first, end = offset // self._chunk, -(-(offset + length) // self._chunk)
        for start in range(first, end, _AT_ONCE):
            stop = min(start + _AT_ONCE, end)
            if self._settled.find(0, start, stop) >= 0 and not self.failure:
                self._save(start, stop)

    def end(self) -> None:
        """Log what is waiting, and close the log. Whoever comes later passes."""
        with self._turn:
            self._ended = True
            self._turn.notify_all()
        self._thread.join()
        self._writer.close()

    def fail(self, reason: str) -> None:
        """Give the epoch up."""
        self.failure = self.failure or reason
        with self._turn:
            for batch in {*self._pending.values(), *self._waiting.parts}:
                batch.done.set()
            self._pending.clear()
            self._turn.notify_all()

    def _save(self, start: int, stop: int) -> None:
        """Have the chunks of a range logged, those that nobody logs already by this thread's own reading."""
        others, mine = set(), []
        ours = _Batch()
        with self._turn:
            if self.failure or self._ended:
                return
            for number in range(start, stop):
                if not self._settled[number]:
                    batch = self._pending.setdefault(number, ours)
                    if batch is ours:
                        mine.append(number)
                    else:
                        others.add(batch)
        if mine:
            try:
                images = self._read(mine)
            except Exception as error:  # others wait for these chunks
                self.fail(f"what is about to be overwritten cannot be read: {error}")
                return
            with self._turn:
                if self._ended:  # the copy is done, and nothing needs to be logged any more
                    ours.done.set()
                elif not self.failure:
                    self._waiting.take(mine, images, ours)
                    self._turn.notify_all()
            ours.done.wait()
        for batch in others:
            batch.done.wait()

    def _read(self, numbers: Sequence[int]) -> list[memoryview]:
        """Return the images of chunks, in memory that the device reads straight into."""
        images = []
        for number in numbers:
            try:
                image = self._memory.pop()
            except IndexError:
                image = memoryview(mmap.mmap(-1, self._chunk))
            images.append(image[: self._device.size - number * self._chunk])
            self._device.read_into(number * self._chunk, images[-1])
        return images

    def _run(self) -> None:
        """Claim and log what waits, all of it at a time."""
        while True:
            with self._turn:
                while not self._waiting.numbers and not self._ended and not self.failure:
                    self._turn.wait(1)
                if self.failure or not self._waiting.numbers:
                    break
                batch, self._waiting = self._waiting, _Batch()
            try:
                self._log(batch)
            except BlockferryError as error:
                self.fail(error.message)
            except Exception as error:  # writers wait for this thread
                log.exception("logging failed")
                self.fail(str(error))

    def _log(self, batch: _Batch) -> None:
        numbers = np.array(batch.numbers, np.int64)
        try:
            won = np.flatnonzero(self._index.claim(self._claims, self._host, numbers))
        except EpochClosedError:
            # The copy is done. Had the index forgotten the epoch instead, the coordinator would not find our claims.
            won = np.empty(0, np.int64)
        if won.size:
            self._writer.append(numbers[won], [batch.images[number] for number in won.tolist()])
            self.bytes_logged += int(won.size) * self._chunk
        with self._turn:
            for number in batch.numbers:
                self._settled[number] = 1
                self._pending.pop(number, None)
        for each in batch.parts:
            each.done.set()
        self._memory += [image for image in batch.images if len(image) == self._chunk]


class _Batch:
    """Chunks that are logged together, and those whose wait is over then."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.images: list[memoryview] = []
        self.parts: list[_Batch] = []
        self.done = threading.Event()

    def take(self, numbers: Sequence[int], images: Sequence[memoryview], part: _Batch) -> None:
        """Add what one writer brings."""
        self.numbers += numbers
        self.images += images
        self.parts.append(part)
