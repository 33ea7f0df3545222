"""The device or file that is being filled while it is in use.

What is half restored must not look like a volume: after a crash somebody's fstab, or udev, would mount it. So its head,
where the signatures of filesystems and partition tables are, lies in a file beside the map until all the rest is there.
On the target is meanwhile the restore's mark, and zeros: by the mark it is known again, whatever it is called after a
reboot, and nothing else is taken for it. `finish` puts the head in its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import BlockferryError, TargetError
from blockferry.target import HALF_RESTORED, HEAD, claimed_device, existing_file, explained

_ZEROS = bytes(1 << 20)
_SECTOR = 512
"""Where the mark is: what a disk writes whole or not at all."""


class HotTarget:
    """Bytes of a target, read and written at offsets by several threads. Errors are TargetError."""

    def __init__(
        self,
        path: str,
        descriptor: int,
        size: int,
        *,
        head: int | None,
        block_size: int,
        blank: bool,
        mark: str = "",
    ) -> None:
        """Borrow the descriptors. `head` is the file that has the first bytes, None when they are in their place.

        `blank`: what was never written reads as zeros. `mark` is what the target bears in the place of its head.
        """
        self.path = path
        self.size = size
        self.blank = blank
        self._descriptor = descriptor
        self._head = head
        self._head_size = min(HEAD, size) if head is not None else 0
        self._head_lock = threading.Lock()
        self._block_size = block_size
        self._punches = True
        self._write_through = False
        self._mark = mark
        self.failure = ""
        """Why nothing that is written can be made durable any more."""

    @property
    def is_volume(self) -> bool:
        """Whether the head is in its place."""
        return self._head is None

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return stat.S_ISBLK(os.fstat(self._descriptor).st_mode)

    def begin(self) -> None:
        """Give a file its size, and the target its mark in the place of its head, durably."""
        with explained(self.path, "writing"):
            if not self.is_device:
                os.ftruncate(self._descriptor, max(self.size, os.fstat(self._descriptor).st_size))
            _write_all(self._descriptor, memoryview(_marked(self._mark, min(HEAD, self.size))), 0)
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
        # Asked after it was written: who sets it and then syncs misses nobody.
        if self._write_through:
            self.sync()

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
        if self._write_through:
            self.sync()

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

    def is_gone(self) -> bool:
        """Tell whether the device was taken away: what is still open is nothing any more."""
        facts = os.fstat(self._descriptor)
        number = f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
        return stat.S_ISBLK(facts.st_mode) and not Path("/sys/dev/block", number).exists()

    def finish(self, remember: Callable[[], None]) -> None:
        """Put the head in its place, durably: from now on the target alone is the volume.

        `remember` is called when that is so, before anybody writes to the head again.
        """
        with self._head_lock, self._lasting_failure():
            if self._head is None:
                return
            os.fdatasync(self._descriptor)
            head = memoryview(os.pread(self._head, self._head_size, 0))
            # The mark goes last: until then we can go on, from then on the head is there.
            for first, end in ((_SECTOR, len(head)), (0, _SECTOR)):
                _write_all(self._descriptor, head[first:end], first)
                os.fdatasync(self._descriptor)
            try:
                remember()
            except BlockferryError:
                # The head's file is still the truth.
                _write_all(self._descriptor, memoryview(_marked(self._mark, min(_SECTOR, self.size))), 0)
                raise
            self._head, self._head_size = None, 0

    def write_through(self) -> None:
        """Have everything that was written, and each write from now on, on the disk when it returns."""
        self._write_through = True
        self.sync()

    def release(self) -> None:
        """Let others open the target, too, though it is still written to."""
        with explained(self.path, "opening it once more"):
            shared = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        # The number stays, and with it whoever uses it just now: what goes is what held the device exclusively.
        os.dup2(shared, self._descriptor, inheritable=False)
        os.close(shared)

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
            if error.errno == errno.EBUSY:
                return False  # the kernel does it for who holds the device alone, and that is somebody else by now
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                with explained(self.path, f"zeroing {length} bytes at {start}"):
                    raise
            self._punches = False
        return self._punches

    def _write_zeros(self, start: int, end: int) -> None:
        for offset in range(start, end, len(_ZEROS)):
            self.write(offset, memoryview(_ZEROS)[: min(len(_ZEROS), end - offset)])


@contextlib.contextmanager
def open_target(
    path: str, size: int, head: Path, *, mark: str, resume: bool, finished: bool, force: bool
) -> Iterator[HotTarget]:
    """Open a place for an image of `size` bytes and hold it.

    `head` is where its first bytes are kept. To `resume`, what is on it stays, and so does the head, unless all was
    `finished`; it has to bear the `mark`. Else a new file is made, or what is there yields to `force`: it stays empty,
    a device as it is, until it is told to `begin`. Raise TargetError as `target.prepare` does.
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
        block_size, blank = 1, not is_device
        device, begun = None, True
        if is_device:
            device = held.enter_context(claimed_device(path, size, force=force or resume))
            descriptor, block_size = device.descriptor, device.volume.block_size
        else:
            begun = os.stat(path).st_size > 0
            length = size if resume else 0
            descriptor = held.enter_context(existing_file(path, length, force=force or resume, keep=resume))
        opened = None if finished else held.enter_context(_open_head(head, size, resume=resume))
        target = HotTarget(path, descriptor, size, head=opened, block_size=block_size, blank=blank, mark=mark)
        if resume and not finished:
            if begun:
                _refuse_another(path, descriptor, head, mark)
            else:
                target.begin()
        yield target
        if device and target.is_volume:
            device.announce(size)


def bears(path: str, mark: str) -> bool:
    """Tell whether a device or file bears the mark of a restore."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return bool(mark) and os.pread(descriptor, _SECTOR, 0) == _marked(mark, _SECTOR)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _marked(mark: str, length: int) -> bytes:
    """Return what a target begins with until its head is there."""
    return (HALF_RESTORED + f", by the hot restore {mark}\n".encode()).ljust(length, b"\0")[:length]


def _refuse_another(path: str, target: int, head: Path, mark: str) -> None:
    """Raise TargetError unless a target bears the mark, or its head is in its place: then it was about to finish."""
    with explained(path, "reading the head"):
        stored = head.read_bytes()
        first = min(_SECTOR, len(stored))
        if os.pread(target, first, 0) == _marked(mark, first) or os.pread(target, len(stored), 0) == stored:
            return
    raise TargetError(
        f"{path}: is not what this restore began on, or was written to since",
        remedy="Devices get other names at a reboot: name the right one, which begins with `blockferry: half restored`,"
        " and by --name what the restore is called. To begin anew: `blockferry detach --forget`, then attach --force.",
    )


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
                os.fsync(descriptor)
                kernel.sync_directory(path.parent)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]
