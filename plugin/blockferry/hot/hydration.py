"""Bringing a volume back behind its user's back: what was just missed and its neighbourhood first, then in disk order.

It stands back while the disk is in use: after each read of its own it rests for as long as keeps its share small, and
while somebody waits for the repository again and again it reads only now and then: whoever waits brings something in.
What a user who reads in sequence is about to need is fetched without rest: that is the user's own work, done early.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable

from blockferry.errors import BlockferryError
from blockferry.hot.cache import LOCKS, TargetCache
from blockferry.hot.source import UnavailableError

log = logging.getLogger(__name__)

_WINDOW = 8 << 20
"""Bytes that are read at a time: a few units, so that asking for them costs little."""
_STEP = 1 << 20
"""The same while somebody uses the disk, or waits."""
_IN_USE = 0.1
"""Seconds since the last request for which the disk counts as in use."""
_SHARE = 1 / 8
"""Of the time, for hydration, while the disk is in use."""
_LONGEST_REST = 2.0
_JUST_NOW = 0.05
"""Seconds since somebody's last wait for the repository within which he is about to wait again."""
_LONGEST_BACK = 0.5
"""Seconds that hydration leaves the repository to those who wait for it: it is not to starve."""
_AGAIN = 30.0
"""Seconds until what could not be had is tried again, and the longest wait for a target that takes nothing."""
_AWAY = 5.0
"""Seconds until a repository that everybody has lost patience with is looked for again."""


class Hydration:
    """The threads that fill a target. `finished` is called once, by one of them, when all is there."""

    def __init__(self, cache: TargetCache, *, threads: int, rate: float | None) -> None:
        """Read with so many threads at a time, at most `rate` bytes a second; 0: only what is about to be needed."""
        self.cache = cache
        self.complete = threading.Event()
        self._rate = rate
        self._allowed_at = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._position = 0
        self._urgent: collections.deque[int] = collections.deque()
        self._near: collections.deque[int] = collections.deque()
        self._taken: set[int] = set()
        self._failed: dict[int, float] = {}
        self._unwritten: dict[int, str] = {}
        self._in_a_row = 0
        self._per_window = max(_WINDOW // cache.unit, 1)
        self._per_step = max(_STEP // cache.unit, 1)
        self._threads = [
            threading.Thread(target=self._run, args=[index], name=f"hydrate {index}", daemon=True)
            for index in range(threads)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, after what is being read."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def unreadable(self) -> list[int]:
        """Return the units that the repository could not give."""
        return sorted(set(self._failed) - set(self._unwritten))

    def failure(self) -> str:
        """Return why the target does not take what the repository gives; empty if it does."""
        return next(iter(list(self._unwritten.values())), "")

    def _run(self, index: int) -> None:
        while not self._stop.is_set() and not self.complete.is_set():
            with self._lock:
                first, end, urgent = self._next(alone=index == 0)
                self._taken.update(range(first, end))
            began = time.monotonic()
            if first == end:
                self.cache.activity.wanting.wait(0.02)
                continue
            try:
                self._fill(first, end)
            except Exception:  # the others would wait for this thread's share for ever
                log.exception("hydration of units %d to %d", first, end)
                self._failed.update(dict.fromkeys(range(first, end), time.monotonic()))
            finally:
                with self._lock:
                    self._taken.difference_update(range(first, end))
            if not urgent:
                self._rest(time.monotonic() - began, (end - first) * self.cache.unit)

    def _next(self, *, alone: bool) -> tuple[int, int, bool]:
        """Return units to fill, and whether somebody is about to need them; (0, 0) if there are none now."""
        self._look_at_reads()
        first, end = self._from(self._urgent)
        if first < end:
            return first, end, True
        if self._rate == 0:
            self._look_whether_complete()
            return 0, 0, False
        if self._in_use() and not alone:
            return 0, 0, False
        first, end = self._from(self._near)
        if first < end:
            return first, end, False
        return *self._in_order(self._per_step if self._in_use() else self._per_window), False

    def _from(self, queued: collections.deque[int]) -> tuple[int, int]:
        """Take the next units that are missing from a queue, a few at most; (0, 0) if there are none."""
        while queued:
            first = queued.popleft()
            if not self._is_done(first):
                end = first + 1
                while end - first < self._per_step and queued and queued[0] == end and self._fits(first, end):
                    queued.popleft()
                    end += 1
                return first, end
        return 0, 0

    def _fits(self, first: int, number: int) -> bool:
        """Tell whether a unit is missing, and used like another: then both can be filled in one go."""
        return not self._is_done(number) and self.cache.is_used(number) == self.cache.is_used(first)

    def _look_at_reads(self) -> None:
        """Queue what follows the latest read in sequence, and the latest miss."""
        followed, missed = self.cache.activity.take()
        if followed >= 0:
            self._urgent = collections.deque(self._following(followed))
        if missed >= 0:
            self._near = collections.deque(self._following(missed))

    def _following(self, number: int) -> range:
        last = -(-self.cache.size // self.cache.unit)
        return range(number + 1, min(number + 1 + self.cache.ahead, last))

    def _in_order(self, most: int) -> tuple[int, int]:
        """Return the next run of units that are missing, of at most `most`."""
        first = self._missing_from(self._position)
        if first < 0:
            first = self._missing_from(0)
        if first < 0:
            self._look_whether_complete()
            return 0, 0
        end, most = first + 1, most if self.cache.is_used(first) else LOCKS
        while end - first < most and self.cache.next_missing(end) == end and self._fits(first, end):
            end += 1
        self._position = end
        return first, end

    def _look_whether_complete(self) -> None:
        if not self._taken and self.cache.next_missing(0) < 0:
            self.complete.set()

    def _missing_from(self, number: int) -> int:
        """Return the first unit from `number` on that is missing and that nobody works on or failed to get; or -1."""
        number = self.cache.next_missing(number)
        while number >= 0 and self._is_done(number):
            number = self.cache.next_missing(number + 1)
        return number

    def _is_done(self, number: int) -> bool:
        failed = self._failed.get(number)
        waits = failed is not None and time.monotonic() - failed < _AGAIN
        there = self.cache.is_whole(number) or self.cache.is_coming(number)
        return there or number in self._taken or waits

    def _fill(self, first: int, end: int) -> None:
        """Fill units, either all of them used or none; those that cannot be had, or written, are remembered."""
        if not self.cache.is_used(first):
            self._write(first, end, functools.partial(self.cache.fill_unused, first, end))
            return
        try:
            contents = self.cache.source.fetch(first, end)
        except UnavailableError as error:
            if self.cache.source.down_since is not None:
                self._stop.wait(_AWAY)  # nothing is wrong with these, nor with the rest
            elif end - first > 1:
                for number in range(first, end):
                    self._fill(number, number + 1)
            else:
                log.warning("hydration: %s", error.message)
                self._failed[first] = time.monotonic()
            return
        for number, content in zip(range(first, end), contents, strict=True):
            if not self._write(number, number + 1, functools.partial(self.cache.fill, number, content)):
                return
        # They are views of one large piece of memory, which the last of them keeps.
        self.cache.source.forget(first, end)

    def _write(self, first: int, end: int, fill: Callable[[], None]) -> bool:
        """Have units written to the target; return whether it took them. Where it did not, wait longer and longer."""
        try:
            fill()
        except BlockferryError as error:
            log.error("hydration: %s", error.message)
            self._unwritten.update(dict.fromkeys(range(first, end), error.message))
            self._failed.update(dict.fromkeys(range(first, end), time.monotonic()))
            self._in_a_row += 1
            return not self._stop.wait(min(2.0**self._in_a_row, _AGAIN))
        for number in range(first, end):
            self._unwritten.pop(number, None)
            self._failed.pop(number, None)
        self._in_a_row = 0
        return True

    def _in_use(self) -> bool:
        return time.monotonic() - self.cache.activity.latest < _IN_USE

    def _rest(self, worked: float, count: int) -> None:
        """Wait for as long as the user's rate asks for, the disk's users, and whoever waits for the repository."""
        if self._rate:
            with self._lock:
                self._allowed_at = max(self._allowed_at, time.monotonic() - 1) + count / self._rate
                pause = self._allowed_at - time.monotonic()
            if pause > 0:
                self._stop.wait(pause)
        if self._in_use():
            self._stop.wait(min(worked * (1 / _SHARE - 1), _LONGEST_REST))
        deadline = time.monotonic() + _LONGEST_BACK
        while self.cache.activity.has_fetched(_JUST_NOW) and time.monotonic() < deadline and not self._stop.wait(0.01):
            pass
