"""An image in a repository as a layer: chunks fetched by a worker, on demand or ahead of a reader."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator

from blockferry.errors import BlockferryError, DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer
from blockferry_borg.client import BATCH, SLOT_SIZE, SLOTS, Worker

RECORD_LIMIT = 16 << 20
MAP_LIMIT = 1 << 30
"""Bytes of a record and of a stored map at most: what is more was not written by us."""

_RANDOM_SLOT = 0
_AHEAD = range(1, SLOTS)
"""One slot for who reads at an offset, the rest for who reads on: on-demand reads wait for few others."""


class OpenArchive:
    """An archive that a worker has open: its items are read by chunk number. May be used by several threads."""

    def __init__(self, worker: Worker, archive: str, items: tuple[str, ...]) -> None:
        """Open items of an archive; raise DamagedSnapshotError if it is not of the form that we write."""
        self.worker = worker
        self.archive = archive
        self._patience = worker.environment.read_patience()
        opened = worker.ask(patience=self._patience, op="open", archive=archive, items=list(items))
        self.unit: int = opened["unit"]
        self.sizes: dict[str, int] = opened["sizes"]
        self._lock = threading.Lock()
        self._count = 0
        self._unanswered = 0
        self._answered: dict[int, Exception | None] = {}
        if self.unit > SLOT_SIZE or set(self.sizes) != set(items):
            raise self.damaged("is not in chunks and items as blockferry stores them")

    def damaged(self, what: str) -> DamagedSnapshotError:
        """Return the error for an archive that is not what it should be."""
        return DamagedSnapshotError(
            f"{self.worker.where}::{self.archive}: {what}",
            remedy="Check it with `borg check`; list it with `borg list`.",
        )

    def request(self, item: str, runs: list[tuple[int, int]], slot: int) -> int:
        """Ask for chunks, runs of (first, count), to be put into a slot; return the number of the request."""
        with self._lock:
            self._count += 1
            self._unanswered += 1
            self.worker.send(read=self._count, item=item, runs=runs, slot=slot)
            return self._count

    def wait(self, number: int) -> None:
        """Return when a request is answered; raise DamagedSnapshotError or another error if it cannot be."""
        with self._lock:
            while number not in self._answered:
                reply = self.worker.receive(self._patience)
                self._unanswered -= 1
                self._answered[reply["read"]] = self.worker.error(reply) if "error" in reply else None
            error = self._answered.pop(number)
        if error:
            raise error

    def read_item(self, item: str, limit: int) -> bytes:
        """Return the whole of a small item; raise DamagedSnapshotError if it is larger than `limit` bytes."""
        size, unit = self.sizes[item], self.unit
        if size > limit:
            raise self.damaged(f"{item} has {size} bytes")
        content = bytearray()
        for number in range(-(-size // unit)):
            self.wait(self.request(item, [(number, 1)], _RANDOM_SLOT))
            content += self.worker.slot(_RANDOM_SLOT)[: min(unit, size - number * unit)]
        return bytes(content)

    def close(self) -> None:
        """Have the worker close the archive; it can be asked for something else then.

        Raise RepositoryError if it cannot, or still has to answer somebody who does not wait any more.
        """
        with self._lock:
            if self._unanswered:
                raise self.damaged("was closed in the middle of a read")
            self.worker.ask(patience=self._patience, op="close")


class ImageLayer(BaseLayer):
    """The image of a snapshot. Has the archive's worker to itself until it is closed."""

    def __init__(
        self, opened: OpenArchive, image: str, extents: ExtentSet, size: int, give_back: Callable[[Worker], None]
    ) -> None:
        """Give the image of an open archive that has `extents` of a volume of `size` bytes."""
        self._opened = opened
        self._give_back: Callable[[Worker], None] | None = give_back
        self._image = image
        self._unit = opened.unit
        self.size = size
        self.extents = extents
        self._random = threading.Lock()
        self._streaming = threading.Lock()
        if opened.sizes[image] != self.size:
            raise opened.damaged(f"the image has {opened.sizes[image]} bytes, its map {self.size}")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from as many whole chunks as it touches; what is not in the image is not fetched."""
        end = offset + len(buffer)
        wanted = self.extents.clip(offset, end)
        if wanted.total != len(buffer):
            buffer[:] = bytes(len(buffer))
        with self._random:
            for chunks in wanted.align(self._unit, self.size).batches(self._batch):
                self._opened.wait(self._request(chunks, _RANDOM_SLOT))
                for start, piece in self._pieces(chunks, _RANDOM_SLOT):
                    for place, length in wanted.clip(start, start + len(piece)):
                        buffer[place - offset : place - offset + length] = piece[place - start : place - start + length]

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the extents' bytes in order while the worker fetches the next ones.

        One reader at a time is read ahead for; a second one gets plain reads.
        """
        if not self._streaming.acquire(blocking=False):
            yield from super().stream(extents, batch)
            return
        try:
            position = 0
            for start, piece in self._chunks_ahead(extents.intersection(self.extents).align(self._unit, self.size)):
                yield from _zeros(extents.clip(position, start), batch)
                position = start + len(piece)
                self._blank_outside(start, piece)
                for place, length in extents.clip(start, position):
                    for at in range(place, place + length, batch):
                        yield at, piece[at - start : min(at + batch, place + length) - start]
            yield from _zeros(extents.clip(position, max(position, extents.end)), batch)
        finally:
            self._streaming.release()

    def close(self) -> None:
        """Give the worker back, or end it if it does not answer as it should."""
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            self._opened.close()
        except BlockferryError:
            self._opened.worker.close()
        else:
            give_back(self._opened.worker)

    @property
    def _batch(self) -> int:
        """The bytes that are asked for at a time: whole chunks."""
        return max(BATCH // self._unit, 1) * self._unit

    def _chunks_ahead(self, chunks: ExtentSet) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of runs of chunks in order, with the slots that are free asked for what follows."""
        asked: collections.deque[tuple[int, ExtentSet, int]] = collections.deque()
        free = list(_AHEAD)
        batches = chunks.batches(self._batch)
        try:
            while True:
                while free and (batch := next(batches, None)) is not None:
                    slot = free.pop()
                    asked.append((self._request(batch, slot), batch, slot))
                if not asked:
                    return
                number, batch, slot = asked.popleft()
                free.append(slot)
                self._opened.wait(number)
                yield from self._pieces(batch, slot)
        finally:
            for number, _batch, _slot in asked:
                self._opened.wait(number)

    def _request(self, chunks: ExtentSet, slot: int) -> int:
        runs = [(start // self._unit, -(-length // self._unit)) for start, length in chunks]
        return self._opened.request(self._image, runs, slot)

    def _pieces(self, chunks: ExtentSet, slot: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of each run of chunks that lies in a slot."""
        content, position = self._opened.worker.slot(slot), 0
        for start, length in chunks:
            yield start, content[position : position + length]
            position += length

    def _blank_outside(self, start: int, piece: memoryview) -> None:
        """Zero the bytes of stored chunks that are not in the map: the volume had something unused there."""
        inside = self.extents.clip(start, start + len(piece)).shift(-start)
        for gap, length in inside.complement(len(piece)):
            piece[gap : gap + length] = bytes(length)


def _zeros(extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the extents' bytes as zeros."""
    zeros = memoryview(bytes(min(batch, extents.total)))
    for start, length in extents:
        for offset in range(start, start + length, batch):
            yield offset, zeros[: min(batch, start + length - offset)]
