"""Nobody can write: the volume is in no use, or only mounted read-only, and stays so.

A device is opened exclusively. For an image file a lease (fcntl(2)) keeps out whoever would open it for writing; where
one cannot be had, because a loop device has the file or the filesystem knows no leases, its loop devices are opened
exclusively, no process may have the file open for writing, and its time of change must stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from blockferry import kernel
from blockferry.errors import VolumeError
from blockferry.freeze import CannotHoldError, entered
from blockferry.hookspecs import Declined, FreezeOptions, Frozen, hookimpl
from blockferry.inuse import Claim, InUseError, claim
from blockferry.snapshot import Stability
from blockferry.volume import Mount, Volume


@hookimpl
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Hold a volume that nobody writes to as it is."""
    del options
    return entered("offline", _held_device(volume) if volume.is_device else _held_image(volume), declined)


@contextlib.contextmanager
def _held_device(volume: Volume) -> Iterator[Frozen]:
    with _claimed(volume) as claimed:
        yield Frozen(volume, Stability.OFFLINE, _how(claimed) or "opened exclusively", claimed.check)


@contextlib.contextmanager
def _held_image(volume: Volume) -> Iterator[Frozen]:
    with contextlib.ExitStack() as held:
        descriptor = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, descriptor)
        try:
            held.enter_context(kernel.read_lease(descriptor))
        except OSError as error:
            claimed = held.enter_context(_claimed(volume))
            writer = error.errno == errno.EAGAIN
            if writer and not claimed.descriptors:
                raise CannotHoldError("somebody has the image open for writing") from None
            how = _how(claimed) or ("loop devices opened exclusively" if claimed.descriptors else "")
            seen = "no process has it open for writing" + ("" if writer else f"; no lease: {error.strerror}")
            method, check = ", ".join(filter(None, (how, seen))), claimed.check
        else:
            method, check = "lease against writers", _leased(volume, descriptor)
        # Only now: what a loop device still held back was written to the file when its devices were claimed.
        yield Frozen(volume, Stability.OFFLINE, method, _all(check, _unchanged(volume, descriptor)))


@contextlib.contextmanager
def _claimed(volume: Volume) -> Iterator[Claim]:
    """Claim the volume's devices, allowing read-only mounts."""
    with contextlib.ExitStack() as taken:
        try:
            claimed = taken.enter_context(claim(volume.path, _read_only))
        except InUseError as error:
            raise CannotHoldError("; ".join(error.users)) from None
        yield claimed


def _read_only(mount: Mount) -> bool:
    return mount.read_only


def _how(claimed: Claim) -> str:
    """Return where the volume is mounted read-only; "" if it is not."""
    points = sorted({mount.point for mount in claimed.mounts})
    return f"mounted read-only at {', '.join(points)}" if points else ""


def _leased(volume: Volume, descriptor: int) -> Callable[[], None]:
    """Return a check that nobody opened the file for writing."""

    def check() -> None:
        if not kernel.lease_held(descriptor):
            raise VolumeError(
                f"{volume.path}: somebody opened the image for writing during the backup",
                remedy="Start what uses the image (a virtual machine, a mount) when the backup is done.",
            )

    return check


def _unchanged(volume: Volume, descriptor: int) -> Callable[[], None]:
    """Return a check that the file's size and time of change are what they are now."""

    def state() -> tuple[int, int]:
        facts = os.fstat(descriptor)
        return facts.st_size, facts.st_mtime_ns

    before = state()

    def check() -> None:
        if state() != before:
            raise VolumeError(
                f"{volume.path}: the image was written to during the backup",
                remedy="Stop what writes to it and run the backup again.",
            )

    return check


def _all(*checks: Callable[[], None]) -> Callable[[], None]:
    def check() -> None:
        for each in checks:
            each()

    return check
