"""What one host does in one epoch: it writes out, comes into the path, freezes, holds, lets go, logs, and seals."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blockferry import kernel
from blockferry.cluster import epoch as words
from blockferry.cluster.before_images import BeforeImages
from blockferry.cluster.epoch import Epoch, Report, Stage
from blockferry.cluster.guard import Guard
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log import LogLayer
from blockferry.cluster.log_writer import LogWriter
from blockferry.cluster.shared_device import SharedDevice
from blockferry.cluster.users_device import UsersDevice
from blockferry.errors import BlockferryError
from blockferry.freeze import CannotHoldError
from blockferry.freeze.suspension import suspended
from blockferry.volume import Mount, Volume

log = logging.getLogger(__name__)

_TRY_EVERY = 0.005
"""Seconds between two attempts to hand over a piece of a log."""
_PIECE = 1 << 20
"""Bytes of a log that are handed over at a time."""
PLACE = struct.Struct("<Q")
"""Before each piece: where it belongs on the volume; alone at the end: how many bytes all pieces had."""


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
        self._let_go_at = math.inf
        """When users do not wait any longer (monotonic clock)."""
        self._writing_out: threading.Thread | None = None
        self._bytes = 0
        self._over = threading.Event()

    @property
    def is_pressed(self) -> bool:
        """Whether this host's users, or another's, may be waiting."""
        return self.report in (None, Report.READY, Report.QUIET, Report.HELD)

    @property
    def needs_path(self) -> bool:
        """Whether what users write has to pass this host's guard."""
        return self.report is not Report.SEALED

    def join(self) -> None:
        """Log from now on: nothing has passed here since the instant."""
        self.images = self._new_images()
        self._guard.log_by(self.images)
        self._index.put(words.report_key(self.epoch.id, self._host), {"state": Report.LOGGING.value})
        self.report = Report.LOGGING

    def failure(self) -> str:
        """Return why this host cannot go on, "" if it can."""
        if self.is_pressed and time.monotonic() > self._let_go_at:
            return f"the other hosts were not ready within {words.HELD:g} s"
        return self.images.failure if self.images else ""

    def figures(self) -> dict[str, Any]:
        """Return what a report says beside how far this host is."""
        return {"bytes": self._bytes, "frozen": self.frozen, "remarks": self.remarks}

    def follow(self, stage: Stage, users: Volume | None, device: UsersDevice | None) -> Report | None:
        """Do what a stage asks for, once; return what there is to report. Raise BlockferryError if it cannot be."""
        match stage, self.report:
            case Stage.PREPARE, None:
                if not self._written_out(users):
                    return None
                self.images = self._new_images()
                if device:
                    device.guard()
            case Stage.FREEZE, Report.READY:
                began = time.monotonic()
                self._freeze(users)
                if self.frozen:
                    self._let_go_at = began + words.HELD
            case Stage.HOLD, Report.QUIET:
                self._let_go_at = min(self._let_go_at, time.monotonic() + words.HELD)
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

    def _written_out(self, users: Volume | None) -> bool:
        """Have what is dirty written out, behind our back; return whether it is."""
        if self._writing_out is None:
            self._writing_out = threading.Thread(target=self._write_out, args=[users], name="write out", daemon=True)
            self._writing_out.start()
        return not self._writing_out.is_alive()

    def _write_out(self, users: Volume | None) -> None:
        with contextlib.suppress(OSError, BlockferryError):  # it fails again, and is told, when writes are held
            _write_out(_mounts(users))
            self._guard.sync()

    def _freeze(self, users: Volume | None) -> None:
        """Have the filesystems on the disk keep still if they can, else write out what has become dirty."""
        mounts = _mounts(users)
        if not mounts:
            return
        try:
            self.frozen = self._frozen.enter_context(suspended(mounts, words.HELD)).points
        except CannotHoldError as error:  # a cluster filesystem: all its hosts are held at once, as by a power cut
            self.remarks.append(str(error))
            _write_out(mounts)

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
                        if self._over.wait(_TRY_EVERY):
                            return
        except BlockferryError as error:
            log.error("epoch %s: the log cannot be handed over: %s", self.epoch.id, error.message)

    def _pieces(self, logged: LogLayer) -> Iterator[bytes]:
        for offset, data in logged.stream(logged.extents, _PIECE):
            yield PLACE.pack(offset) + data
        yield PLACE.pack(logged.extents.total)


def _mounts(users: Volume | None) -> list[Mount]:
    """Return the mounts on a disk that may have something to write."""
    return [mount for mount in users.users() if not mount.read_only] if users else []


def _write_out(mounts: Sequence[Mount]) -> None:
    for mount in mounts:
        descriptor = os.open(mount.point, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kernel.syncfs(descriptor)
        finally:
            os.close(descriptor)
