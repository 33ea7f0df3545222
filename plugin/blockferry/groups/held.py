"""An offline volume, held so that nobody else takes it, and at the same time mounted read-only for us to look at.

The kernel does not mount a device that somebody holds exclusively, nor a file under a lease for another who opens it.
So what is mounted is a read-only loop device on the very descriptor that holds the volume. It goes away by itself with
its last user; the mount lies where `fuse.mount_point` takes it away, whatever this process dies of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import TargetError, VolumeError
from blockferry.inuse import claim
from blockferry.layers import FileLayer
from blockferry.programs import find
from blockferry.target import claimed_device, explained
from blockferry.used.ext4 import reader as ext4
from blockferry.used.ext4.superblock import UnanswerableError
from blockferry.used.xfs import reader as xfs
from blockferry.used.xfs.log import XfsError
from blockferry.volume import Volume, loops_of

EXT = ("ext2", "ext3", "ext4")
_PATIENCE = 20.0
"""Seconds for which a mount or a loop device may stay when it is not wanted any more: udev looks at each."""
_HARMLESS = "ro,nosuid,nodev,noexec"
_OPTIONS = {"ext4": f"{_HARMLESS},noload", "xfs": f"{_HARMLESS},norecovery,nouuid"}
"""Of each filesystem, how it is mounted so that not even the kernel writes to it."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A volume that nobody else has, opened for reading and writing."""

    volume: Volume
    descriptor: int
    check_untouched: Callable[[], None]
    """Raises TargetError if anybody wrote to it since it is held, ourselves included."""
    check_alone: Callable[[], None]
    """Raises TargetError if anybody else wants to."""

    def check_clean(self) -> None:
        """Raise TargetError unless its filesystem was unmounted, so that it is on the disk as it is."""
        layer = FileLayer(self.descriptor, self.volume.size, name=self.volume.path)
        try:
            (xfs if self.volume.filesystem == "xfs" else ext4).check_clean(layer)
        except (UnanswerableError, XfsError) as error:
            raise TargetError(
                f"{self.volume.path}: the filesystem is not clean: {error}",
                remedy="Mount and unmount it once, or run e2fsck or xfs_repair; then try again.",
            ) from None


@contextlib.contextmanager
def held(path: str) -> Iterator[Held]:
    """Hold a device or image file; raise TargetError or VolumeError if anybody uses it, or it cannot be written to."""
    is_device = Volume.discover(path).is_device
    with _device(path) if is_device else _image(path) as found:
        kernel.forget_pages(found.descriptor)  # of a device, what an earlier reader left there is old
        yield found


@contextlib.contextmanager
def _device(path: str) -> Iterator[Held]:
    with claimed_device(path, 0, force=True) as device:

        def check_untouched() -> None:
            try:
                os.fsync(device.descriptor)  # what was written to the device's page cache is counted when it is out
                device.claimed.check()
            except (OSError, VolumeError):
                raise _touched(path) from None

        yield Held(device.volume, device.descriptor, check_untouched, lambda: None)
        for descriptor in device.claimed.descriptors.values():
            kernel.forget_pages(descriptor)


@contextlib.contextmanager
def _image(path: str) -> Iterator[Held]:
    with contextlib.ExitStack() as opened:
        claimed = opened.enter_context(claim(path, lambda _mount: False))  # before we have it open ourselves
        if claimed.descriptors:
            raise TargetError(f"{path}: a loop device shows it", remedy="Detach it, or name it as the volume.")
        with explained(path, "opening it for writing"):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, descriptor)
        before = _state(descriptor)
        volume = Volume.discover(path)
        # From here on our opening it by its name would wait for ourselves.
        leased = _try_lease(descriptor, opened)

        def check_alone() -> None:
            # Without a lease nobody can be kept out; who shows it as a device is seen.
            if leased and not kernel.lease_held(descriptor):
                raise TargetError(f"{path}: somebody else wants to write to it", remedy="Run it again without.")
            if loops_of(path):
                raise TargetError(f"{path}: a loop device shows it", remedy="Detach it; then run it again.")

        def check_untouched() -> None:
            check_alone()
            if _state(descriptor) != before or not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                raise _touched(path)

        yield Held(volume, descriptor, check_untouched, check_alone)
        kernel.forget_pages(descriptor)


def _try_lease(descriptor: int, opened: contextlib.ExitStack) -> bool:
    """Keep everybody else out, where the filesystem knows how to; else say that it does not."""
    try:
        opened.enter_context(kernel.write_lease(descriptor))
    except OSError:
        return False
    return True


def _state(descriptor: int) -> tuple[int, int]:
    facts = os.fstat(descriptor)
    return facts.st_size, facts.st_mtime_ns


def _touched(path: str) -> TargetError:
    return TargetError(
        f"{path}: somebody wrote to it while its files were looked at: nothing was written",
        remedy="Find out what uses it, and run it again without.",
    )


@contextlib.contextmanager
def mounted_read_only(volume: Held, point: Path) -> Iterator[None]:
    """Mount a held volume on a directory, without its journal; afterwards nothing shows it any more, or TargetError."""
    with _shown(volume) as device:
        kind = "ext4" if volume.volume.filesystem in EXT else volume.volume.filesystem
        command = [find("mount"), "-i", "-t", kind, "-o", _OPTIONS[kind], "--", device, os.fspath(point)]
        try:
            done = _run(command)
            if done.returncode:
                raise TargetError(
                    f"{volume.volume.path}: cannot be mounted: {done.stderr.strip()}",
                    remedy="Run e2fsck or xfs_repair, and look at the kernel log.",
                )
            yield
        finally:
            _unmount(point)


@contextlib.contextmanager
def _shown(volume: Held) -> Iterator[str]:
    """Show a held volume as a read-only loop device."""
    path = f"/proc/self/fd/{volume.descriptor}"
    with explained(volume.volume.path, "making a loop device of it"):
        loop = kernel.attach_loop_read_only(volume.descriptor)
    try:
        yield str(Path(f"/proc/self/fd/{loop}").readlink())
    finally:
        os.close(loop)
        _await(lambda: not loops_of(path))
    if loops_of(path):
        raise TargetError(
            f"{volume.volume.path}: somebody has the loop device that showed it, or its mount, open",
            remedy="See `losetup --list`; nothing was written. Run it again.",
        )


def _unmount(point: Path) -> None:
    """Unmount what is on a directory, if anything: whoever looks at every mount may have it open for a moment."""
    _await(lambda: not point.is_mount() or not _run([find("umount"), "--", os.fspath(point)]).returncode)


def _await(done: Callable[[], bool]) -> None:
    """Wait until something is done, but not for ever."""
    deadline = time.monotonic() + _PATIENCE
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that Ctrl-C does not reach."""
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, start_new_session=True
    )
