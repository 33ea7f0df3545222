"""Images of archives that only the `borg` command can read: through `borg mount`, or out of `borg extract`."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer
from blockferry_borg.command import Running

Extract = Callable[[], AbstractContextManager[Running]]
"""Starts a borg that prints an image."""


class _Image(BaseLayer):
    """What both have in common: bytes that the image does not have are not asked for, and read as zero."""

    def __init__(self, name: str, extents: ExtentSet, size: int) -> None:
        self.name = name
        self.size = size
        self.extents = extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; raise DamagedSnapshotError if borg does not give all of it."""
        buffer[:] = bytes(len(buffer))
        for start, length in self.extents.clip(offset, offset + len(buffer)):
            self._fill(start, buffer[start - offset : start - offset + length])

    def _fill(self, offset: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def _damaged(self, offset: int, why: str) -> DamagedSnapshotError:
        return DamagedSnapshotError(
            f"{self.name}: the bytes at {offset} cannot be had: {why}", remedy="Run `borg check` on the repository."
        )


class MountedImage(_Image):
    """An image in a mounted archive: random access at borg's own speed."""

    def __init__(self, name: str, extents: ExtentSet, size: int, mounted: AbstractContextManager[Path]) -> None:
        """Mount the archive, and keep it mounted until `close`; raise what the mount raises."""
        super().__init__(name, extents, size)
        with contextlib.ExitStack() as opened:
            self._path = opened.enter_context(mounted)
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, self._descriptor)
            if os.fstat(self._descriptor).st_size != self.size:
                raise self._damaged(0, f"the image has {os.fstat(self._descriptor).st_size} bytes, its map {self.size}")
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Unmount."""
        self._opened.close()

    def _fill(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = self._read(offset + done, buffer[done:])
            except OSError as error:
                raise self._damaged(offset + done, error.strerror or "borg mount failed") from None
            if not count:
                raise self._damaged(offset + done, "it ends there")
            done += count

    def _read(self, offset: int, buffer: memoryview) -> int:
        """Read some bytes; return how many."""
        try:
            return os.preadv(self._descriptor, [buffer], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # The mount of borg 2.0.0b23 fails when the kernel asks it about an open file, after a second. Anew it opens.
        fresh = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(fresh, self._descriptor, inheritable=False)
        os.close(fresh)
        return os.preadv(self._descriptor, [buffer], offset)


class ExtractedImage(_Image):
    """An image as `borg extract --stdout` prints it, for a borg that cannot mount.

    Reading on is as fast as borg is; reading backwards starts it anew.
    """

    def __init__(self, name: str, extents: ExtentSet, size: int, extract: Extract) -> None:
        super().__init__(name, extents, size)
        self._extract = extract
        self._lock = threading.Lock()
        self._opened = contextlib.ExitStack()
        self._running: Running | None = None
        self._position = 0

    def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the extents' bytes; at the end make sure that borg is content with what it printed."""
        yield from super().stream(extents, batch)
        with self._lock:
            if self._running and self._position == self.size:
                self._running.wait()
                self._running.check(warnings_are_errors=True)

    def close(self) -> None:
        """End borg."""
        with self._lock:
            self._opened.close()
            self._running = None

    def _fill(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            if self._running is None or offset < self._position:
                self._opened.close()
                self._running = self._opened.enter_context(self._extract())
                self._position = 0
            skipped = memoryview(bytearray(min(1 << 20, offset - self._position)))
            while self._position < offset:
                self._take(self._running, skipped[: offset - self._position])
            self._take(self._running, buffer)

    def _take(self, running: Running, buffer: memoryview) -> None:
        """Fill the buffer with what borg prints next."""
        assert running.pipe  # noqa: S101  # it was started with one
        count = running.pipe.readinto(buffer)  # type: ignore[attr-defined]
        if count != len(buffer):
            running.wait()
            running.check(warnings_are_errors=True)
            raise self._damaged(self._position + count, "borg extract ends there")
        self._position += count
