"""A running machine's disk is read as it was in one instant, while the guest goes on: see `fleecing`.

No other way can hold such a disk still, so whatever stands in the way is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from blockferry.errors import BlockferryError, VolumeError
from blockferry.hookspecs import Frozen, hookimpl
from blockferry.programs import find
from blockferry.qemu import fleecing, watchdog
from blockferry.qemu.fleecing import Scratch
from blockferry.qemu.name import DiskName
from blockferry.qemu.qmp import connected, wait_until
from blockferry.snapshot import Stability
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_SPARED = 5
"""One in so many free bytes is left to others."""

_ASK_SECONDS = 0.05
"""How old an answer of the machine's may be: to ask takes 2 ms, and a small read less."""


@hookimpl
def blockferry_freeze(volume: Volume) -> AbstractContextManager[Frozen] | None:
    """Hold a running machine's disk still."""
    disk = DiskName.parse(volume.path)
    return _held(volume, disk) if disk else None


@contextlib.contextmanager
def _held(volume: Volume, disk: DiskName) -> Iterator[Frozen]:
    nbdfuse = find("nbdfuse")
    fleecing.remove_stale_scratch()
    if fleecing.end(disk.socket):
        log.warning("%s: removed what a crashed backup left", disk.socket)
    with contextlib.ExitStack() as held:
        with connected(disk.socket) as monitor:
            owner = monitor.peer()
        place = held.enter_context(fleecing.scratch(volume.size, owner))
        dog = held.enter_context(_watched(disk, place))
        with connected(disk.socket) as monitor:
            fleecing.begin(monitor, disk, place)
        _mount(nbdfuse, place, held)
        seen = Volume.discover(place.disk)
        if seen.size != volume.size:
            raise VolumeError(f"{volume.path}: was resized to {seen.size} bytes", remedy="Run the backup again.")
        still = dataclasses.replace(volume, path=seen.path, filesystem=seen.filesystem)
        guarantee = _Guarantee(volume, disk, place, dog)
        try:
            yield Frozen(still, Stability.CRASH_CONSISTENT, "QEMU backup job", guarantee.check)
        except BlockferryError:
            guarantee.check(ask=True)  # tells more, if that is why
            raise
        guarantee.check(ask=True)


@contextlib.contextmanager
def _watched(disk: DiskName, place: Scratch) -> Iterator[subprocess.Popen[bytes]]:
    """Have a watchdog take away from the machine, on leaving or when we are killed, what we are about to add."""
    spared = fleecing.free_bytes(place) // _SPARED
    command = [sys.executable, "-P", "-m", watchdog.__name__, disk.socket, str(place.path), str(spared)]
    dog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")
    try:
        yield dog
    finally:
        dog.communicate()
        if dog.returncode not in (0, watchdog.NO_ROOM):
            fleecing.end(disk.socket)


def _mount(nbdfuse: str, place: Scratch, held: contextlib.ExitStack) -> None:
    """Show the machine's export as a file, until `held` closes and the watchdog has unmounted it."""
    command = [nbdfuse, "--readonly", str(place.disk), place.uri(fleecing.EXPORT)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    held.callback(process.communicate)
    held.callback(process.kill)  # it only reads, and an open descriptor would keep it
    held.callback(place.unmount)
    wait_until(lambda: place.mounted() or process.poll() is not None, "mounting by nbdfuse")
    if process.poll() is not None:
        reason = (process.communicate()[1] or b"").decode(errors="replace").strip()
        raise VolumeError(f"{place.disk}: nbdfuse: {reason}", remedy="Can this user mount by FUSE?")


@dataclasses.dataclass
class _Guarantee:
    """Whether the machine still keeps the disk as it was."""

    volume: Volume
    disk: DiskName
    place: Scratch
    dog: subprocess.Popen[bytes]
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    asked: float = 0.0

    def check(self, *, ask: bool = False) -> None:
        """Raise VolumeError if it does not: noticed after 50 ms, or at once with `ask`. Readers have many threads."""
        with self.lock:
            if ask or time.monotonic() - self.asked > _ASK_SECONDS:
                self.asked = time.monotonic()
                self._ask()

    def _ask(self) -> None:
        if self.dog.poll() == watchdog.NO_ROOM:
            raise VolumeError(
                f"{self.place.path.parent}: too little room for what the guest overwrote during the backup",
                remedy="Set TMPDIR to a directory with more room, or back up when less is written.",
            )
        with connected(self.disk.socket) as monitor:
            if not fleecing.running(monitor):
                raise VolumeError(
                    f"{self.volume.path}: the machine stopped keeping the disk as it was",
                    remedy=f"Let nobody cancel its block job {fleecing.JOB}; run the backup again.",
                )
