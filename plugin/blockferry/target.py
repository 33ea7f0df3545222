"""Where a restored image is written: a new file, an existing file or a block device; and what is refused.

A restore that does not reach its end leaves nothing that looks complete. A new file gets its name when it is done. An
existing file or a device cannot be had twice, so its head, where the signatures of filesystems and partition tables
are, is zeroed at the first write and put back, as restored, at the very end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import TargetError
from blockferry.extents import ExtentSet
from blockferry.inuse import Claim, InUseError, claim, device_name
from blockferry.programs import find
from blockferry.volume import Volume, loops_of, probe

log = logging.getLogger(__name__)

HEAD = 1 << 20
"""What is written last: all that blkid looks for at the start of a volume lies below (btrfs at 64 KiB is the last)."""
HALF_RESTORED = b"blockferry: half restored"
"""What a target begins with while a hot restore has not brought everything to it."""

_ZEROS = bytes(1 << 20)

_REMEDIES = {
    errno.ENOSPC: "Make room on the filesystem, or restore to another place.",
    errno.EDQUOT: "Raise the quota, or restore to another place.",
    errno.EFBIG: "The filesystem cannot hold a file of this size: restore to another one.",
    errno.EIO: "Look at the kernel log: the disk may be failing.",
    errno.ENXIO: "The device vanished: attach it and restore again.",
    errno.ENODEV: "The device vanished: attach it and restore again.",
    errno.EACCES: "Run as root, or restore to a place that your user may write.",
    errno.EPERM: "It is protected: see `blockdev --getro`, `lsattr`.",
    errno.EROFS: "It is read-only: see `blockdev --getro` and the mount options.",
}


class Target:
    """An open restore target of `size` bytes. Used from one thread; errors are TargetError."""

    def __init__(self, path: str, descriptor: int, size: int, *, head: bytearray | None, block_size: int = 1) -> None:
        """Borrow `descriptor`. `head` is what the target begins with, None if it needs no care."""
        self.path = path
        self.size = size
        self.finished = False
        self._descriptor = descriptor
        self._head = head or bytearray()
        self._head_withheld = False
        self._block_size = block_size
        self._punches = True

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise TargetError(
                f"{self.path}: the snapshot has bytes at {offset + len(view)}, beyond its own size of {self.size}",
                remedy="The snapshot is damaged: check the repository, restore another one.",
            )
        self._withhold_head()
        within = max(0, min(len(view), len(self._head) - offset))
        self._head[offset : offset + within] = view[:within]
        self._pwrite(offset + within, view[within:])

    def zero(self, extents: ExtentSet, *, must: bool = False) -> None:
        """Give back the space of `extents`, which then read as zeros.

        Where the target cannot do that, what was there stays, unless they `must` be zeros: then zeros are written.
        """
        for start, length in extents.clip(0, self.size):
            if not (self._punches or must) and start >= len(self._head):
                return
            self._withhold_head()
            within = max(0, min(length, len(self._head) - start))
            self._head[start : start + within] = bytes(within)
            self._zero(start + within, start + length, must=must)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with what the target holds at `offset`, to compare; what it lacks reads as zeros."""
        done = max(0, min(len(buffer), len(self._head) - offset))
        buffer[:done] = self._head[offset : offset + done]
        with explained(self.path, f"reading at {offset}"):
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not count:
                    buffer[done:] = bytes(len(buffer) - done)
                done += count or len(buffer) - done

    def finish(self) -> None:
        """Make everything durable, the head last; only now the target is what was to be restored."""
        with explained(self.path, "writing"):
            os.fsync(self._descriptor)
            if self._head_withheld:
                self._pwrite(0, memoryview(self._head))
                self._head_withheld = False
            if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
        self.finished = True

    def _withhold_head(self) -> None:
        """Zero the head on the disk until `finish`: from now on the target is neither the old nor the new."""
        if self._head and not self._head_withheld:
            self._head_withheld = True
            self._pwrite(0, memoryview(bytes(len(self._head))))
            with explained(self.path, "writing"):
                os.fdatasync(self._descriptor)

    def _zero(self, start: int, end: int, *, must: bool) -> None:
        """Zero `[start, end)`, which is not in the head: by punching, else, if they must be, by writing zeros."""
        inner_start = min(-(-start // self._block_size) * self._block_size, end)
        inner_end = max(end // self._block_size * self._block_size, inner_start)
        if inner_end > inner_start and not self._fallocate(inner_start, inner_end - inner_start, must=must) and must:
            self._write_zeros(inner_start, inner_end)
        if must:
            self._write_zeros(start, inner_start)
            self._write_zeros(inner_end, end)

    def _fallocate(self, start: int, length: int, *, must: bool) -> bool:
        """Have the kernel zero a range of whole blocks; return whether it could."""
        for mode in (kernel.PUNCH_HOLE_KEEP_SIZE, kernel.ZERO_RANGE_KEEP_SIZE):
            if mode == kernel.PUNCH_HOLE_KEEP_SIZE and not self._punches:
                continue
            try:
                kernel.fallocate(self._descriptor, mode, start, length)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise _explanation(self.path, f"zeroing {length} bytes at {start}", error) from None
            else:
                return True
            self._punches = False
            if not must:
                return False
        return False

    def _write_zeros(self, start: int, end: int) -> None:
        """Write zeros where `[start, end)` is not a hole already."""
        while start < end:
            with explained(self.path, f"writing at {start}"):
                try:
                    start = max(start, os.lseek(self._descriptor, start, os.SEEK_DATA))
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        return  # holes up to the end
                    if error.errno != errno.EINVAL:
                        raise
            count = min(len(_ZEROS), end - start)
            if count > 0:
                self._pwrite(start, memoryview(_ZEROS)[:count])
            start += count

    def _pwrite(self, offset: int, view: memoryview) -> None:
        with explained(self.path, f"writing {len(view)} bytes at {offset}"):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                offset, view = offset + count, view[count:]


@contextlib.contextmanager
def prepare(path: str, size: int, *, force: bool = False, keep: bool = False) -> Iterator[Target]:
    """Open a place for an image of `size` bytes; without `Target.finish`, nothing that looks complete is left there.

    An existing file or a device that holds something only yields to `force`; with `keep` a file's content stays until
    it is written over, to be compared. Raise TargetError if it is in use, too small, or not a place for an image.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        opened = _new_file(path, size)
    except OSError as error:
        raise _explanation(path, "looking at it", error) from None
    else:
        if stat.S_ISBLK(mode):
            opened = _device(path, size, force=force)
        elif stat.S_ISREG(mode):
            opened = _existing_file(path, size, force=force, keep=keep)
        else:
            raise TargetError(
                f"{path}: neither a block device nor a file", remedy="Name a device, an image file or a new file."
            )
    with opened as target:
        yield target


@contextlib.contextmanager
def _new_file(path: str, size: int) -> Iterator[Target]:
    """Make a sparse file beside `path`, readable by its owner alone, that gets the name when it is finished."""
    final = Path(path)
    if final.is_symlink():
        raise TargetError(f"{path}: a symbolic link to nothing", remedy="Remove it, or make what it names.")
    with explained(path, "making the file"):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{final.name}.blockferry-", dir=final.parent)
    try:
        with explained(path, "making the file"):
            os.ftruncate(descriptor, size)
        target = Target(path, descriptor, size, head=None)
        yield target
        if target.finished:
            with explained(path, "naming the file"):
                kernel.rename_new(temporary, path)
                kernel.sync_directory(final.parent)
    finally:
        os.close(descriptor)
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _existing_file(path: str, size: int, *, force: bool, keep: bool) -> Iterator[Target]:
    """Write to a file that is there already, in place: its owner, mode and links stay."""
    with existing_file(path, size, force=force, keep=keep) as descriptor:
        yield Target(path, descriptor, size, head=_read_head(path, descriptor, size))


@contextlib.contextmanager
def _device(path: str, size: int, *, force: bool) -> Iterator[Target]:
    """Write to a block device; then have the kernel look at its partitions again."""
    with claimed_device(path, size, force=force) as device:
        head = _read_head(path, device.descriptor, size)
        target = Target(path, device.descriptor, size, head=head, block_size=device.volume.block_size)
        yield target
        if target.finished:
            device.announce(size)


@contextlib.contextmanager
def existing_file(path: str, size: int, *, force: bool, keep: bool) -> Iterator[int]:
    """Open a file to write an image of `size` bytes to, and give its descriptor; with `keep` its content stays."""
    with contextlib.ExitStack() as held:
        descriptor = _open(path, held)
        _refuse_file_in_use(path, descriptor)
        length = os.fstat(descriptor).st_size
        if length and not force:
            content = ", ".join([f"{length} bytes", *_signatures(path)])
            raise TargetError(f"{path}: holds {content} already", remedy="Write over it with --force.")
        with explained(path, "sizing the file"):
            if not keep:
                os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))
        yield descriptor


@dataclasses.dataclass(frozen=True)
class ClaimedDevice:
    """A block device that is held exclusively for writing an image to it."""

    volume: Volume
    descriptor: int
    claimed: Claim

    def announce(self, size: int) -> None:
        """Have the kernel forget what it knew of the content; say what a device larger than the image still needs."""
        for descriptor in self.claimed.descriptors.values():
            with contextlib.suppress(OSError):  # a partition, a loop device without partitions; it was given up already
                kernel.forget_pages(descriptor)
                kernel.reread_partitions(descriptor)
        if self.volume.size > size and probe(self.volume.path).get("PTTYPE") == "gpt":
            log.warning(
                "%s is larger than the image: the backup of its partition table is not at its end; "
                "`sgdisk --move-second-header` moves it there",
                self.volume.path,
            )


@contextlib.contextmanager
def claimed_device(path: str, size: int, *, force: bool) -> Iterator[ClaimedDevice]:
    """Open a block device for an image of `size` bytes, held exclusively to the end."""
    volume = Volume.discover(path)
    if volume.size < size:
        raise TargetError(
            f"{path}: has {volume.size} bytes, the image needs {size}", remedy="Name a device that is large enough."
        )
    with contextlib.ExitStack() as held:
        claimed = _claim(path, held, os.O_RDWR)
        facts = os.stat(path)
        descriptor = claimed.descriptors[os.major(facts.st_rdev), os.minor(facts.st_rdev)]
        if kernel.is_read_only(descriptor):
            raise TargetError(f"{path}: is read-only", remedy="See `blockdev --getro`, or the disk's own switch.")
        content = _signatures(path)
        if content and not force:
            raise TargetError(f"{path}: holds {', '.join(content)}", remedy="Write over it with --force.")
        yield ClaimedDevice(volume, descriptor, claimed)


def _refuse_file_in_use(path: str, descriptor: int) -> None:
    """Raise TargetError if a loop device shows the file or a process may write to it."""
    loops = [device_name(loop.device) for loop in loops_of(path)]
    if loops:
        raise TargetError(
            f"{path}: in use: {', '.join(loops)} shows it",
            remedy=f"Detach it (losetup --detach {loops[0]}), or name it as the target.",
        )
    # A write lease is granted if nobody else at all has the file open; where it is not, look closer.
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        with contextlib.ExitStack() as held:
            _claim(path, held)


def _claim(path: str, held: contextlib.ExitStack, access: int = os.O_RDONLY) -> Claim:
    """Claim a target; not even a read-only mount is harmless to it."""
    try:
        return held.enter_context(claim(path, lambda _mount: False, access))
    except InUseError as error:
        raise TargetError(error.message, remedy=error.remedy) from None


def _signatures(path: str) -> list[str]:
    """Return the kinds of every filesystem, partition table and the like on a device, as `wipefs` names them.

    A hot restore that was not completed is one of them: what was written to it since may be nowhere else.

    `blkid` answers nothing at all where it finds several that contradict each other.
    """
    command = [find("wipefs"), "--no-act", "--noheadings", "--output", "TYPE", "--", path]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise TargetError(f"{path}: cannot be looked at: {done.stderr.strip()}")
    with explained(path, "reading the head"), open(path, "rb", buffering=0) as file:
        half = ["a hot restore that is not complete"] if file.read(len(HALF_RESTORED)) == HALF_RESTORED else []
    return [*sorted(set(done.stdout.split())), *half]


def _read_head(path: str, descriptor: int, size: int) -> bytearray:
    with explained(path, "reading the head"):
        return bytearray(os.pread(descriptor, min(HEAD, size), 0))


def _open(path: str, held: contextlib.ExitStack) -> int:
    with explained(path, "opening it for writing"):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    held.callback(os.close, descriptor)
    return descriptor


@contextlib.contextmanager
def explained(path: str, doing: str) -> Iterator[None]:
    """Turn an OSError into a TargetError that says what failed and what to do."""
    try:
        yield
    except OSError as error:
        raise _explanation(path, doing, error) from None


def _explanation(path: str, doing: str, error: OSError) -> TargetError:
    return TargetError(
        f"{path}: {doing} failed: {error.strerror}", remedy=_REMEDIES.get(error.errno or 0, "Restore to another place.")
    )
