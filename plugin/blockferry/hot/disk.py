"""The disk that a hot restore shows: a file through FUSE, and a loop device on it, which any filesystem mounts from.

The loop device reads and writes past the page cache (`losetup --direct-io`), so that what is acknowledged to the
filesystem has reached the cache, and nothing is kept twice. Whoever else reads has to do so, too: a page that is read
while the loop device writes it would keep what it was before. For them the same file is there under a second name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from blockferry.errors import BlockferryError
from blockferry.fuse import mounted
from blockferry.fuse_tree import Node
from blockferry.hot.cache import RestoreCache
from blockferry.inuse import device_name
from blockferry.programs import find
from blockferry.volume import all_mounts, loops_of

log = logging.getLogger(__name__)

FILE_NAME = "disk"
UNCACHED_NAME = "uncached"
_ROOT = Node(1, True, 0, 0)
_PR_SET_IO_FLUSHER = 57
_PATIENCE = 10.0
"""Seconds for a loop device to go away."""


class ReadOnlyDisk:
    """A tree of one file, under two names, that shows a cache."""

    def __init__(self, cache: RestoreCache) -> None:
        self.cache = cache
        self._files = {
            FILE_NAME: Node(2, False, cache.size, 0),
            UNCACHED_NAME: Node(3, False, cache.size, 0, uncached=True),
        }

    def node(self, path: str) -> Node:
        """Return the root or the file."""
        if path == "/":
            return _ROOT
        try:
            return self._files[path.removeprefix("/")]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    def children(self, _path: str) -> Iterable[tuple[str, Node]]:
        """Return the file's names."""
        return self._files.items()

    def open(self, path: str) -> int:
        """Return a handle, which is not looked at again."""
        return self.node(path).inode

    def read_into(self, _handle: int, offset: int, buffer: memoryview) -> int:
        """Read from the cache."""
        count = max(0, min(len(buffer), self.cache.size - offset))
        with _as_errno():
            self.cache.read_into(offset, buffer[:count])
        return count

    def seek(self, _handle: int, _offset: int, _whence: int) -> int:
        """Know of no holes."""
        raise OSError(errno.ENOSYS, "no holes")


class Disk(ReadOnlyDisk):
    """The same, to be written to as well."""

    def write_from(self, _handle: int, offset: int, data: memoryview) -> None:
        """Write to the cache."""
        if offset + len(data) > self.cache.size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        with _as_errno():
            self.cache.write(offset, data)

    def zero(self, _handle: int, offset: int, length: int) -> None:
        """Discard."""
        with _as_errno():
            self.cache.zero(offset, min(length, self.cache.size - offset))

    def sync(self, _handle: int) -> None:
        """Make what was written durable."""
        with _as_errno():
            self.cache.sync()


@contextlib.contextmanager
def shown(cache: RestoreCache, name: str) -> Iterator[Path]:
    """Show a cache as a file for the length of the context, and give its path."""
    _become_flusher()
    tree = Disk(cache) if cache.writable else ReadOnlyDisk(cache)
    with mounted(tree, name=f"hot-{name}") as directory:
        yield directory / FILE_NAME


@contextlib.contextmanager
def loop_device(path: Path, record: Path, *, block_size: int, read_only: bool) -> Iterator[str]:
    """Give a loop device on a file; it goes away with the context, or as soon as nobody uses it any more.

    `record` says in a file which it is: if we are killed, the next one of that record takes it away first.
    """
    detach_stale(record)
    device = attach_loop(path, block_size=block_size, read_only=read_only)
    try:
        record.write_text(json.dumps([device, _sequence(device)]))
        yield device
    finally:
        detach_loops(path)
        record.unlink(missing_ok=True)


def attach_loop(path: Path, *, block_size: int, read_only: bool) -> str:
    """Return a new loop device on a file, with its partitions."""
    losetup = find("losetup")
    command = [losetup, "--find", "--show", "--partscan", f"--sector-size={block_size}"]
    if read_only:
        command.append("--read-only")
    # Some filesystems, such as tmpfs, have no direct I/O: a target there is shown through the page cache.
    for direct in ("--direct-io=on", "--direct-io=off"):
        done = subprocess.run([*command, direct, os.fspath(path)], capture_output=True, text=True, check=False)
        if not done.returncode:
            break
    else:
        raise BlockferryError(
            f"{path}: no loop device can be had: {done.stderr.strip()}",
            remedy="Load the kernel module (modprobe loop).",
        )
    return done.stdout.strip()


def detach_stale(record: Path) -> None:
    """Detach the loop device that a record names, if it is still the same one; in use, it goes when it is not any more.

    The file behind it may be gone and tell nothing any more. The kernel numbers all that ever were attached.
    """
    with contextlib.suppress(OSError, ValueError):
        device, sequence = json.loads(record.read_text())
        if _sequence(device) == sequence:
            log.info("%s: detaching what a process that died has left", device)
            subprocess.run([find("losetup"), "--detach", device], capture_output=True, check=False)
    record.unlink(missing_ok=True)


def _sequence(device: str) -> str:
    """Return the number of what is attached to a loop device (sysfs-block, `diskseq`), and the name of its file."""
    found = Path("/sys/block", Path(device).name)
    name = Path((found / "loop" / "backing_file").read_text().rstrip("\n")).name
    number = (found / "diskseq").read_text().strip() if (found / "diskseq").exists() else "unknown"  # Linux 5.15
    return f"{number} {name}"


def mount(device: str, directory: str) -> str:
    """Mount a device; return why that cannot be, else ""."""
    if os.path.ismount(directory):
        return f"{directory}: something is mounted there already"
    # As what takes a network, which this does: systemd then unmounts it before it stops us (systemd.mount(5)).
    command = [find("mount"), "-o", "_netdev", "--", device, directory]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return f"it cannot be mounted: {done.stderr.strip()}" if done.returncode else ""


def unmount(device: str, directory: str) -> None:
    """Unmount a device unless somebody did; wait a while for those who are in it."""
    facts = os.stat(device)
    numbers = (os.major(facts.st_rdev), os.minor(facts.st_rdev))
    deadline = time.monotonic() + _PATIENCE
    while any((each.point, each.device) == (directory, numbers) for each in all_mounts()):
        done = subprocess.run([find("umount"), "--", directory], capture_output=True, text=True, check=False)
        if done.returncode and time.monotonic() > deadline:
            log.warning("%s: stays mounted: %s", directory, done.stderr.strip())
            return
        if done.returncode:
            time.sleep(0.2)


def detach_loops(path: Path) -> None:
    """Detach every loop device on a file, and wait until they are gone; those in use go when they are not any more."""
    deadline = time.monotonic() + _PATIENCE
    while (loops := loops_of(os.fspath(path))) and time.monotonic() < deadline:
        for loop in loops:
            name = device_name(loop.device)
            subprocess.run([find("losetup"), "--detach", name], capture_output=True, check=False)
        time.sleep(0.02)


@contextlib.contextmanager
def _as_errno() -> Iterator[None]:
    """Turn what a cache raises into EIO for who uses the disk."""
    try:
        yield
    except BlockferryError as error:
        log.error("%s", error.message)
        raise OSError(errno.EIO, error.message) from None


def _become_flusher() -> None:
    """Tell the kernel that this process is needed to write out dirty pages (prctl(2), PR_SET_IO_FLUSHER).

    Else it could be made to wait for room that only it can make. Needs CAP_SYS_RESOURCE; without it all is as usual.
    """
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
