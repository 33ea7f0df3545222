"""A host's part in epochs: it looks at what the coordinator says, has its guard do that, and reports."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry import kernel
from blockferry.cluster import epoch as words
from blockferry.cluster.before_images import BeforeImages
from blockferry.cluster.epoch import Epoch, Report, Stage
from blockferry.cluster.guard import Guard
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log import LogLayer, LogWriter
from blockferry.cluster.shared_device import SharedDevice
from blockferry.errors import BlockferryError, LogIndexError
from blockferry.freeze import CannotHoldError
from blockferry.freeze.suspension import suspended
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_IDLE, _BUSY = 0.2, 0.005
"""Seconds between two looks at the index: when nothing happens, and while users wait."""
_PIECE = 1 << 20
"""Bytes of a log that are handed over at a time."""
PLACE = struct.Struct("<Q")
"""Before each piece: where it belongs on the volume; alone at the end: how many bytes all pieces had."""


class Member:
    """Follows the epochs of one volume on one host, in a thread of its own."""

    def __init__(self, guard: Guard, device: SharedDevice, index: LogIndex, about: dict[str, Any], spool: Path) -> None:
        """`about` is what other hosts learn of this one: `volume`, `host` and more; the log is written to `spool`."""
        self._guard, self._device, self._index, self._spool = guard, device, index, spool
        self._volume, self._host, self._about = str(about["volume"]), str(about["host"]), about
        self._part: Part | None = None
        self._done = ""
        """The epoch that this host has nothing to do with any more."""
        self._announced = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="member", daemon=True)
        self._untold: tuple[str, str] | None = None
        """The epoch that was given up here, and why, as long as the index does not know."""
        self.index_failure = ""
        self.users: Volume | None = None
        """The device that this host's filesystems lie on."""

    def start(self) -> None:
        """Announce this host, and take part in an epoch that is open already; raise LogIndexError if that fails."""
        self._announce()
        current = self._current()
        if current:
            known = self._index.get(words.report_key(current.id, self._host))
            if current.stage is Stage.OPEN and known is None:
                # Nothing has passed here since the instant: what is going to pass is logged.
                self._part = self._new_part(current)
                self._part.join()
            else:
                self._give_up(current.id, "its guard was started anew" if known else "its guard was started meanwhile")
        self._thread.start()

    def stop(self) -> None:
        """Take part no more."""
        self._stopping.set()
        self._thread.join()
        if self._part:
            self._fail(self._part, "its guard was stopped")
        with contextlib.suppress(BlockferryError):
            self._index.remove(words.host_key(self._volume, self._host))

    def status(self) -> dict[str, Any]:
        """Return what `guard status` says of epochs."""
        part = self._part
        return {
            "epoch": part.epoch.id if part else "",
            "stage": part.report.value if part and part.report else "",
            "failure": self.index_failure or (part.images.failure if part and part.images else ""),
        }

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
                self.index_failure = ""
            except BlockferryError as error:
                if isinstance(error, LogIndexError):
                    self.index_failure = error.message
                if self._part:
                    self._fail(self._part, error.message)
            except Exception as error:  # a host whose guard does not follow would go on logging for ever
                log.exception("following the epoch failed")
                if self._part:
                    self._fail(self._part, str(error))
            self._stopping.wait(_BUSY if self._part and self._part.users_wait else _IDLE)

    def _step(self) -> None:
        if time.monotonic() - self._announced > words.RENEWED:
            self._announce()
        if self._untold:
            self._tell_failure()
        current = self._current()
        part = self._part
        if part and (current is None or current.id != part.epoch.id):
            log.info("epoch %s is over", part.epoch.id)
            part.end()
            self._part = part = None
        if current is None or current.id == self._done:
            return
        if part is None:
            if current.stage is not Stage.PREPARE:
                self._give_up(current.id, "its guard missed the beginning")
                return
            part = self._part = self._new_part(current)
        if part.failure():
            self._fail(part, part.failure())
            return
        report = part.follow(current.stage, self.users)
        if report:
            self._report(part.epoch.id, report, **part.figures())
            part.report = report
            if report is Report.SEALED:
                part.hand_over()

    def _new_part(self, current: Epoch) -> Part:
        return Part(current, self._guard, self._device, self._index, self._host, self._spool)

    def _fail(self, part: Part, reason: str) -> None:
        """Give the epoch that is under way up: writes pass."""
        self._part = None
        part.end()
        self._give_up(part.epoch.id, reason)

    def _give_up(self, epoch: str, reason: str) -> None:
        """Take no part in an epoch, and say so, as soon as that can be said: it is void then."""
        log.error("epoch %s: %s", epoch, reason)
        self._done, self._untold = epoch, (epoch, reason)
        with contextlib.suppress(BlockferryError):  # else later; the coordinator misses our report meanwhile
            self._tell_failure()

    def _tell_failure(self) -> None:
        if self._untold:
            self._report(self._untold[0], Report.FAILED, reason=self._untold[1])
            self._untold = None

    def _current(self) -> Epoch | None:
        said = self._index.get(words.epoch_key(self._volume))
        try:
            return Epoch.from_json(said) if said else None
        except (ValueError, KeyError, TypeError) as error:
            raise BlockferryError(f"{self._index.reference}: holds an epoch that cannot be read: {error}") from None

    def _announce(self) -> None:
        self._index.put(words.host_key(self._volume, self._host), self._about, lasts=words.HEARD_OF)
        self._announced = time.monotonic()

    def _report(self, epoch: str, report: Report, **more: Any) -> None:
        said = {"state": report.value, "process": os.getpid(), **more}
        self._index.put(words.report_key(epoch, self._host), said)


class Part:
    """What one host does in one epoch, from the first stage to the last."""

    def __init__(
        self, epoch: Epoch, guard: Guard, device: SharedDevice, index: LogIndex, host: str, spool: Path
    ) -> None:
        self.epoch = epoch
        self.report: Report | None = None
        self.images: BeforeImages | None = None
        self.frozen: list[str] = []
        """Mount points of the filesystems that hold still."""
        self.remarks: list[str] = []
        """Why others do not."""
        self._guard, self._device, self._index, self._host = guard, device, index, host
        self._path = spool
        self._frozen = contextlib.ExitStack()
        self._let_go_at = time.monotonic() + words.HELD
        self._bytes = 0
        self._over = threading.Event()

    @property
    def users_wait(self) -> bool:
        """Whether this host's users may be waiting."""
        return self.report in (None, Report.QUIET, Report.HELD)

    def join(self) -> None:
        """Log from now on: nothing has passed here since the instant."""
        self.images = self._new_images()
        self._guard.log_by(self.images)
        self._index.put(words.report_key(self.epoch.id, self._host), {"state": Report.LOGGING.value})
        self.report = Report.LOGGING

    def failure(self) -> str:
        """Return why this host cannot go on, "" if it can."""
        if self.users_wait and time.monotonic() > self._let_go_at:
            return f"the other hosts were not ready within {words.HELD:g} s"
        return self.images.failure if self.images else ""

    def figures(self) -> dict[str, Any]:
        """Return what a report says beside how far this host is."""
        return {"bytes": self._bytes, "frozen": self.frozen, "remarks": self.remarks}

    def follow(self, stage: Stage, users: Volume | None) -> Report | None:
        """Do what a stage asks for, once; return what there is to report. Raise BlockferryError if it cannot be."""
        match stage, self.report:
            case Stage.PREPARE, None:
                self.images = self._new_images()
                self._freeze(users)
            case Stage.HOLD, Report.QUIET:
                self._guard.hold(max(0.0, self._let_go_at - time.monotonic()))
            case Stage.OPEN, Report.HELD:
                self._guard.release(self.images)
                self._frozen.close()
            case Stage.SEAL, Report.LOGGING:
                self._seal()
            case _:
                if self.report is not words.REPORTED[stage]:
                    raise BlockferryError(f"it was told to {stage}, but has not come so far")
                return None
        return words.REPORTED[stage]

    def hand_over(self) -> None:
        """Have the log sent to the coordinator, behind our back."""
        threading.Thread(target=self._send, name="hand over", daemon=True).start()

    def end(self) -> None:
        """Let all writes pass, and thaw. The log's file stays, for the next."""
        self._over.set()
        self._guard.log_by(None)
        with contextlib.suppress(BlockferryError):
            self._guard.release(None)
        self._frozen.close()
        if self.images:
            self.images.fail("the epoch is over")
            self.images.end()

    def _new_images(self) -> BeforeImages:
        writer = LogWriter(self._path, chunk=self.epoch.chunk, size=self._device.size, over=True)
        return BeforeImages(self._device, self._index, words.claims_of(self.epoch.id), self._host, writer)

    def _freeze(self, users: Volume | None) -> None:
        """Have the filesystems on the disk write out what is dirty, and keep still if they can."""
        mounts = [mount for mount in users.users() if not mount.read_only] if users else []
        if not mounts:
            return
        try:
            self.frozen = self._frozen.enter_context(suspended(mounts, words.HELD)).points
        except CannotHoldError as error:  # a cluster filesystem: all its hosts are held at once, as by a power cut
            self.remarks.append(str(error))
            for mount in mounts:
                descriptor = os.open(mount.point, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    kernel.syncfs(descriptor)
                finally:
                    os.close(descriptor)

    def _seal(self) -> None:
        """Stop logging; what is in the log is all that this host has overwritten first."""
        assert self.images is not None  # noqa: S101  # made in the first stage
        self._guard.log_by(None)
        self.images.end()
        if self.images.failure:
            raise BlockferryError(self.images.failure)
        with contextlib.closing(LogLayer(self._path, self._device.size)) as logged:
            self._bytes = logged.extents.total

    def _send(self) -> None:
        """Send the log, a piece at a time, as the coordinator takes them."""
        try:
            with contextlib.closing(LogLayer(self._path, self._device.size)) as logged:
                for piece in self._pieces(logged):
                    while not self._index.push(words.log_queue(self.epoch.id, self._host), piece):
                        if self._over.wait(_BUSY):
                            return
        except BlockferryError as error:
            log.error("epoch %s: the log cannot be handed over: %s", self.epoch.id, error.message)

    def _pieces(self, logged: LogLayer) -> Iterator[bytes]:
        for offset, data in logged.stream(logged.extents, _PIECE):
            yield PLACE.pack(offset) + data
        yield PLACE.pack(logged.extents.total)
