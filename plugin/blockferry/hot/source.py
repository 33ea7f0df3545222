"""What a hot restore reads from the repository: whole units, each fetched once for all who want it at the same time.

A repository that does not answer is not a lost one: it is opened again, with growing pauses, for as long as the user's
patience lasts, and whoever reads waits. What is said to be damaged, twice, although the repository could be opened
after each time, is: that is remembered, so that nobody waits for it twice; it is tried again now and then.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from blockferry.errors import BlockferryError, DamagedSnapshotError, RepositoryError
from blockferry.layers import Layer

log = logging.getLogger(__name__)

_CACHE_BYTES = 64 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_SURELY = 2
"""Times that a read has to find damage in a repository that can be opened: while one goes away, files are missing."""
_TRY_DAMAGED_AGAIN = 60.0
"""Seconds after which a unit that could not be had is worth another look."""


class UnavailableError(BlockferryError):
    """Bytes cannot be had from the repository."""


class Source:
    """The image of a snapshot, by numbered units of `unit` bytes. May be used by several threads."""

    def __init__(
        self,
        first: Layer,
        open_another: Callable[[], Layer],
        unit: int,
        *,
        readers: int,
        patience: float,
        shared: bool = False,
    ) -> None:
        """Read from `first`, and from up to `readers` layers in all that `open_another` opens when they are needed.

        `shared`: one layer serves as many reads at once. `patience` is for how many seconds a repository that does not
        answer is waited for.
        """
        self.size = first.size
        self.unit = unit
        self.used = first.extents
        self.bytes_fetched = 0
        self.damaged: dict[int, float] = {}
        self.down_since: float | None = None
        self._open_another = open_another
        self._opening = threading.Lock()
        self._most = readers
        self._patience = patience
        self._state = threading.Condition()
        self._idle: list[Layer] = [first] * (readers if shared else 1)
        self._count = len(self._idle)
        self._closed = self._hurried = False
        self._units: collections.OrderedDict[int, Future[memoryview]] = collections.OrderedDict()

    def length(self, number: int) -> int:
        """Return the bytes of a unit: the last one may be short."""
        return min(self.unit, self.size - number * self.unit)

    def get(self, number: int) -> memoryview:
        """Return the bytes of a unit, which nobody changes; raise UnavailableError if they cannot be had."""
        with self._state:
            future = self._units.get(number)
            if future is not None:
                self._units.move_to_end(number)
        return future.result() if future is not None else self.fetch(number, number + 1)[0]

    def fetch(self, first: int, end: int) -> list[memoryview]:
        """Return the bytes of the units `[first, end)`, those nobody else is about to fetch all in one read."""
        mine: dict[int, Future[memoryview]] = {}
        theirs: dict[int, Future[memoryview]] = {}
        with self._state:
            for number in range(first, end):
                future = self._units.get(number)
                if future is not None:
                    theirs[number] = future
                else:
                    mine[number] = self._units[number] = Future()
        for start, count in _runs(sorted(mine)):
            self._fill(start, [mine[number] for number in range(start, start + count)])
        return [(mine.get(number) or theirs[number]).result() for number in range(first, end)]

    def forget(self, first: int, end: int) -> None:
        """Let go of what was fetched of units that nobody will ask for any more."""
        with self._state:
            for number in range(first, end):
                future = self._units.get(number)
                if future is not None and future.done():
                    del self._units[number]

    def stop_waiting(self) -> None:
        """From now on a repository that does not answer is not waited for, by nobody."""
        with self._state:
            self._hurried = True
            self._state.notify_all()

    def close(self) -> None:
        """Let go of every layer; who still reads gets an error."""
        with self._state:
            self._closed = True
            idle, self._idle = self._idle, []
            self._state.notify_all()
        for layer in idle:
            layer.close()

    def _fill(self, first: int, futures: list[Future[memoryview]]) -> None:
        """Read consecutive units for everybody who waits for them."""
        numbers = range(first, first + len(futures))
        start = first * self.unit
        end = start + sum(map(self.length, numbers))
        buffer = memoryview(bytearray(end - start))
        try:
            if self.used.clip(start, end):
                self._read(start, buffer, numbers)
        except BaseException as error:
            with self._state:
                for number in numbers:
                    del self._units[number]
            for future in futures:
                future.set_exception(error)
            return
        content = buffer.toreadonly()
        for number, future in zip(numbers, futures, strict=True):
            offset = (number - first) * self.unit
            future.set_result(content[offset : offset + self.length(number)])
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        with self._state:
            surplus = len(self._units) - max(_CACHE_BYTES // self.unit, 4)
            if surplus > 0:
                done = (each for each, future in self._units.items() if future.done())
                for number in list(itertools.islice(done, surplus)):
                    del self._units[number]

    def _read(self, start: int, buffer: memoryview, numbers: range) -> None:
        """Read, and open the repository again as often as patience allows; raise UnavailableError."""
        self._refuse_damaged(numbers)
        pause, said_damaged, began = _FIRST_PAUSE, 0, time.monotonic()
        opened = False
        while True:
            try:
                with self._layer() as layer:
                    layer.read_into(start, buffer)
                self._is_up(len(buffer), numbers)
                return
            except UnavailableError:
                raise
            except Exception as caught:  # whatever an adapter did not think of is a failed read, too
                error = caught if isinstance(caught, BlockferryError) else RepositoryError(repr(caught))
            log.warning("reading %d bytes at %d: %s", len(buffer), start, error.message)
            damaged = isinstance(error, DamagedSnapshotError)
            if opened and not damaged:
                self._wait(pause, began, error)
            opened = self._reopen(pause)
            said_damaged = said_damaged + 1 if opened and damaged else 0
            if said_damaged == _SURELY:
                self._remember_damaged(numbers, error)
                raise UnavailableError(error.message, remedy=error.remedy) from None
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _refuse_damaged(self, numbers: range) -> None:
        now = time.monotonic()
        for number in numbers:
            since = self.damaged.get(number)
            if since is not None and now - since < _TRY_DAMAGED_AGAIN:
                raise UnavailableError(f"the bytes at {number * self.unit} could not be had a moment ago")

    def _remember_damaged(self, numbers: range, error: BlockferryError) -> None:
        if len(numbers) == 1:  # of several nobody knows which
            self.damaged[numbers[0]] = time.monotonic()
            log.error("the bytes at %d cannot be had: %s", numbers[0] * self.unit, error.message)

    def _is_up(self, count: int, numbers: range) -> None:
        with self._state:
            self.bytes_fetched += count
            self.down_since = None
            for number in numbers:
                self.damaged.pop(number, None)

    def _reopen(self, pause: float) -> bool:
        """Put a new layer in the place of one that failed; return whether that could be done. Waits where it could not.

        Raise UnavailableError when patience ends.
        """
        try:
            layer = self._opened()
        except BlockferryError as error:
            self.down_since = since = self.down_since or time.monotonic()
            self._wait(pause, since, error)
            return False
        self._give_back(layer, fresh=True)
        self.down_since = None
        return True

    def _wait(self, pause: float, since: float, error: BlockferryError) -> None:
        """Wait before the next try, if patience has not ended; else raise UnavailableError."""
        if self._hurried or time.monotonic() - since > self._patience:
            raise UnavailableError(f"the repository does not answer: {error.message}") from None
        log.warning("the repository does not answer: %s; trying again", error.message)
        with self._state:
            if self._state.wait_for(lambda: self._closed or self._hurried, pause):
                raise UnavailableError("the disk is being detached") from None

    def _opened(self) -> Layer:
        with self._opening:
            if self._closed:
                raise UnavailableError("the disk is being detached")
            return self._open_another()

    @contextlib.contextmanager
    def _layer(self) -> Iterator[Layer]:
        """Lend a layer that nobody else reads from; one that fails is closed and not lent again."""
        layer = self._borrow()
        try:
            yield layer
        except BaseException:
            with self._state:
                self._count -= 1
                self._state.notify()
            layer.close()
            raise
        self._give_back(layer)

    def _borrow(self) -> Layer:
        with self._state:
            self._state.wait_for(lambda: self._closed or self._idle or self._count < self._most)
            if self._closed:
                raise UnavailableError("the disk is being detached")
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            return self._opened()
        except BaseException:
            with self._state:
                self._count -= 1
                self._state.notify()
            raise

    def _give_back(self, layer: Layer, *, fresh: bool = False) -> None:
        with self._state:
            surplus = self._closed or (fresh and self._count >= self._most)
            if not surplus:
                self._count += fresh
                self._idle.append(layer)
                self._state.notify()
        if surplus:
            layer.close()


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the runs of consecutive numbers."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
