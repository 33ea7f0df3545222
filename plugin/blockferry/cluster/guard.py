"""The write path of one host in front of a shared volume: writes pass, are held for an instant, or are logged first.

    Guard        holds writes back while an epoch begins
    WriteBack    if that is wanted: acknowledges writes before they are on the volume (`write_back.py`)
    Logged       has what is overwritten logged first, while an epoch is open
    SharedDevice the volume, past the page cache

Outside of a backup a write costs what the device costs. `hold` returns when all that was acknowledged is durable.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from blockferry.cluster.before_images import BeforeImages
from blockferry.cluster.shared_device import SharedDevice
from blockferry.errors import BlockferryError


class HeldTooLongError(BlockferryError):
    """Writes could not be held, or had to be let go before everybody was ready."""


class Below(Protocol):
    """What a guard passes reads and writes on to."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""

    def sync(self) -> None:
        """Make durable, on the volume, all that was written."""


class Logged:
    """The volume, which is written to after what is overwritten was logged."""

    def __init__(self, device: SharedDevice) -> None:
        self.size = device.size
        self.images: BeforeImages | None = None
        """Who logs; None: nobody has to."""
        self._device = device
        self.read_into = device.read_into
        self.sync = device.sync

    def write(self, offset: int, data: memoryview) -> None:
        """Log, then write."""
        if images := self.images:
            images.save(offset, len(data))
        self._device.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Log, then discard."""
        if images := self.images:
            images.save(offset, length)
        self._device.zero(offset, length)


class Guard:
    """A shared volume as this host's users see it. Implements `RestoreCache`, as far as a disk asks for it."""

    writable = True

    def __init__(self, logged: Logged, below: Below) -> None:
        """Write to `below`, which is `logged` or leads to it."""
        self.size = logged.size
        self._logged, self._below = logged, below
        self._gate = threading.Condition()
        self._held_until: float | None = None
        """When whoever waits goes on in any case (monotonic clock); None: nothing is held."""
        self._under_way = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read what was written."""
        self._below.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """Write, as soon as writes pass."""
        with self._passing():
            self._below.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Discard, which is a write too."""
        with self._passing():
            self._below.zero(offset, length)

    def sync(self) -> None:
        """Make durable what was written."""
        self._below.sync()

    def status(self) -> dict[str, Any]:
        """Return what `guard status` says of the write path."""
        images = self._logged.images
        return {"held": self._held_until is not None, "bytes_logged": images.bytes_logged if images else 0}

    def close(self) -> None:
        """Nothing to let go of: whoever opened the device closes it."""

    def hold(self, seconds: float) -> None:
        """Let no write pass until `release`, for so many seconds at most, and make durable what has passed.

        Raise HeldTooLongError, with nothing held, if what is under way does not end in that time.
        """
        deadline = time.monotonic() + seconds
        with self._gate:
            self._held_until = deadline
            if not self._gate.wait_for(lambda: not self._under_way, seconds):
                self._let_go()
                raise HeldTooLongError(f"writes that were under way did not end within {seconds:g} s")
        self._below.sync()

    def release(self, images: BeforeImages | None) -> None:
        """Let writes pass again, logged by `images`.

        Raise HeldTooLongError if they were let go before, as their time was over; then nothing is logged.
        """
        with self._gate:
            too_late = self._held_until is None or time.monotonic() > self._held_until
            if not too_late:
                self._logged.images = images
            self._let_go()
        if too_late:
            raise HeldTooLongError("not every host was ready in the time for which writes may be held")

    def log_by(self, images: BeforeImages | None) -> None:
        """Have every write that begins from now on logged by `images`, or by nobody."""
        self._logged.images = images

    def _let_go(self) -> None:
        self._held_until = None
        self._gate.notify_all()

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        """Wait while writes are held, at most until their time is over."""
        with self._gate:
            while self._held_until is not None:
                if time.monotonic() >= self._held_until:
                    self._let_go()
                else:
                    self._gate.wait(self._held_until - time.monotonic())
            self._under_way += 1
        try:
            yield
        finally:
            with self._gate:
                self._under_way -= 1
                if not self._under_way:
                    self._gate.notify_all()
