"""The device or file that is being filled while it is in use.

What is half restored must not look like a volume: after a crash somebody's fstab, or udev, would mount it. So its head,
where the signatures of filesystems and partition tables are, lies in a file beside the map until all the rest is there,
and on the target are zeros. `finish` puts it in its place.

The first sector of the target has a mark meanwhile, known to that file alone. Who goes on looks for it: by the time of
the next boot another disk may have the device's name, or somebody may have written to the target.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import BlockferryError, TargetError
from blockferry.target import HEAD, claimed_device, existing_file, explained

_ZEROS = bytes(1 << 20)
_MARK = 512
"""Bytes of the mark: a sector, which a power cut leaves old or new. The head's file has it behind the head."""


class HotTarget:
    """Bytes of a target, read and written at offsets by several threads. Errors are TargetError."""

    def __init__(
        self, path: str, descriptor: int, size: int, *, head: int | None, block_size: int, blank: bool
    ) -> None:
        """Borrow the descriptors. `head` is the file that has the first bytes, None when they are in their place.

        `blank`: what was never written reads as zeros.
        """
        self.path = path
        self.size = size
        self.blank = blank
        self._descriptor = descriptor
        self._head = head
        self._head_size = min(HEAD, size) if head is not None else 0
        self._mark = os.pread(head, _MARK, self._head_size)[:size] if head is not None else b""
        self._head_lock = threading.Lock()
        self._block_size = block_size
        self._punches = True
        self.failure = ""
        """Why nothing that is written can be made durable any more."""

    def begin(self) -> None:
        """Give a file its size and the mark: until then an attempt to begin that broke off leaves an empty one."""
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            with explained(self.path, "sizing the file"):
                os.ftruncate(self._descriptor, max(self.size, os.fstat(self._descriptor).st_size))
                _write_all(self._descriptor, memoryview(self._mark), 0)
                os.fdatasync(self._descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with what was written at `offset`."""
        for descriptor, start, piece in self._places(offset, buffer):
            done = 0
            with explained(self.path, f"reading {len(piece)} bytes at {start}"):
                while done < len(piece):
                    count = os.preadv(descriptor, [piece[done:]], start + done)
                    if not count:
                        raise OSError(errno.ENXIO, "it ends too early")
                    done += count

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        with self._head_held(offset):
            for descriptor, start, piece in self._places(offset, data):
                with explained(self.path, f"writing {len(piece)} bytes at {start}"):
                    _write_all(descriptor, piece, start)

    def zero(self, offset: int, length: int, *, must: bool) -> None:
        """Give back the space of a range, which then reads as zeros; if it `must` be zeros they are written else."""
        end = offset + length
        start = min(max(offset, self._head_size), end)
        if start > offset:
            self.write(offset, memoryview(_ZEROS)[: start - offset])
        inner_start = min(-(-start // self._block_size) * self._block_size, end)
        inner_end = max(end // self._block_size * self._block_size, inner_start)
        punched = inner_end > inner_start and self._punch(inner_start, inner_end - inner_start)
        for first, last in [(start, inner_start), (inner_end, end)] if punched else [(start, end)]:
            if must:
                self._write_zeros(first, last)

    def sync(self) -> None:
        """Make all that was written durable. Once that fails it always does.

        What the kernel could not write out it forgets after it has said so, once (fsync(2)): another try would succeed
        and promise what is not there.
        """
        head = self._head
        with self._lasting_failure():
            os.fdatasync(self._descriptor)
            if head is not None:
                os.fdatasync(head)

    def finish(self, remember: Callable[[], None]) -> None:
        """Put the head in its place, durably: from now on the target alone is the volume.

        `remember` is called when that is so, before anybody writes to the head again.
        """
        with self._head_lock, self._lasting_failure():
            if self._head is None:
                return
            head = memoryview(os.pread(self._head, self._head_size, 0))
            _write_all(self._descriptor, head[_MARK:], _MARK)
            os.fdatasync(self._descriptor)
            _write_all(self._descriptor, head[:_MARK], 0)
            os.fdatasync(self._descriptor)
            try:
                remember()
            except BlockferryError:
                _write_all(self._descriptor, memoryview(self._mark), 0)  # the head's file is still the truth
                raise
            self._head, self._head_size = None, 0

    @contextlib.contextmanager
    def _lasting_failure(self) -> Iterator[None]:
        """Refuse if making things durable failed before, and remember if it does now."""
        if self.failure:
            raise TargetError(
                f"{self.failure}; nothing was durable since",
                remedy="Unmount, detach, look at the kernel log, and attach again: it goes on from what is durable.",
            )
        try:
            with explained(self.path, "making it durable"):
                yield
        except TargetError as error:
            self.failure = error.message
            raise

    def _head_held(self, offset: int) -> contextlib.AbstractContextManager[object]:
        """Keep the head where it is while it is written to."""
        return self._head_lock if offset < self._head_size else contextlib.nullcontext()

    def _places(self, offset: int, view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (descriptor, offset, bytes) of what of a range is in the head's file, and what is on the target."""
        head = self._head
        within = max(0, min(len(view), self._head_size - offset)) if head is not None else 0
        if within and head is not None:
            yield head, offset, view[:within]
        if within < len(view):
            yield self._descriptor, offset + within, view[within:]

    def _punch(self, start: int, length: int) -> bool:
        if not self._punches:
            return False
        try:
            kernel.fallocate(self._descriptor, kernel.PUNCH_HOLE_KEEP_SIZE, start, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                with explained(self.path, f"zeroing {length} bytes at {start}"):
                    raise
            self._punches = False
        return self._punches

    def _write_zeros(self, start: int, end: int) -> None:
        for offset in range(start, end, len(_ZEROS)):
            self.write(offset, memoryview(_ZEROS)[: min(len(_ZEROS), end - offset)])


@contextlib.contextmanager
def open_target(path: str, size: int, head: Path, *, resume: bool, finished: bool, force: bool) -> Iterator[HotTarget]:
    """Open a place for an image of `size` bytes and hold it.

    `head` is where its first bytes are kept. To `resume`, what is on it stays, and so does the head, unless all was
    `finished`. Else a new file is made, or what is there yields to `force`: a file is empty then, until all else is
    ready and it is told to `begin`. Raise TargetError as `target.prepare` does, and if what is to be gone on with is
    not there.
    """
    with contextlib.ExitStack() as held:
        try:
            is_device = stat.S_ISBLK(os.stat(path).st_mode)
        except FileNotFoundError:
            if resume:
                raise TargetError(f"{path}: is gone", remedy="Attach it again, or detach this restore.") from None
            is_device = False
            with explained(path, "making the file"):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        block_size, blank, begun = 1, not is_device, True
        if is_device:
            device = held.enter_context(claimed_device(path, size, force=force or resume))
            descriptor, block_size = device.descriptor, device.volume.block_size
        else:
            length = size if resume else 0
            begun = os.stat(path).st_size > 0
            descriptor = held.enter_context(existing_file(path, length, force=force or resume, keep=resume))
        head_descriptor = None if finished else held.enter_context(_open_head(head, size, resume=resume))
        if head_descriptor is not None:
            with explained(path, "looking at its head"):
                mark = os.pread(head_descriptor, _MARK, min(HEAD, size))
                if resume and begun:
                    _check_mark(path, descriptor, head_descriptor, mark)
                elif is_device:
                    _write_all(descriptor, memoryview((mark + bytes(min(HEAD, size)))[: min(HEAD, size)]), 0)
                    os.fdatasync(descriptor)
        target = HotTarget(path, descriptor, size, head=head_descriptor, block_size=block_size, blank=blank)
        if resume and not begun:
            target.begin()
        yield target


@contextlib.contextmanager
def _open_head(path: Path, size: int, *, resume: bool) -> Iterator[int]:
    """Open the file that has the head, made anew unless we resume."""
    flags = os.O_RDWR | os.O_CLOEXEC | (0 if resume else os.O_CREAT | os.O_TRUNC)
    with explained(str(path), "opening it"):
        descriptor = os.open(path, flags, 0o600)
    try:
        if not resume:
            with explained(str(path), "writing"):
                os.ftruncate(descriptor, min(HEAD, size))
                mark = f"half restored by blockferry, {secrets.token_hex(16)}\n".encode().ljust(_MARK, b"\0")
                _write_all(descriptor, memoryview(mark), min(HEAD, size))
                os.fsync(descriptor)
                kernel.sync_directory(path.parent)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_mark(path: str, target: int, head: int, mark: bytes) -> None:
    """Raise TargetError unless a target has the mark, or the head in its place: `finish` was broken off then."""
    length = os.fstat(head).st_size - len(mark)
    if os.pread(target, _MARK, 0).startswith(mark[:length]) or os.pread(target, length, 0) == os.pread(head, length, 0):
        return
    raise TargetError(
        f"{path}: is not what this restore was begun on, or was written to since",
        remedy="Name the right device. To begin anew: `blockferry detach --forget`, then attach with --force.",
    )


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]
