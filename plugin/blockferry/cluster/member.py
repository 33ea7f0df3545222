"""A host's part in epochs: it looks at what the coordinator says, has its guard do that, and reports."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from blockferry.cluster import epoch as words
from blockferry.cluster.epoch import Epoch, Report, Stage
from blockferry.cluster.guard import Guard
from blockferry.cluster.index import LogIndex
from blockferry.cluster.part import Part
from blockferry.cluster.shared_device import SharedDevice
from blockferry.cluster.users_device import UsersDevice
from blockferry.errors import BlockferryError, LogIndexError
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_IDLE, _BUSY = 0.2, 0.005
"""Seconds between two looks at the index: when nothing happens, and while users wait."""


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
        self.device: UsersDevice | None = None
        """What this host's users have; None: nothing yet."""
        self._device_is_known = False
        self._users: Volume | None = None

    def start(self, *, late: bool) -> None:
        """Announce this host, and take part in an epoch that is open already; raise LogIndexError if that fails.

        If it comes too `late`, as there was a device by which users may have written since the instant, that is void.
        """
        self._announce()
        current = self._current()
        if current:
            known = self._index.get(words.report_key(current.id, self._host))
            if current.stage is Stage.OPEN and known is None and not late:
                # Nothing has passed here since the instant: what is going to pass is logged.
                self._part = self._new_part(current)
                self._part.join()
            else:
                self._give_up(current.id, "its guard was started anew" if known else "its guard was started meanwhile")
        self._thread.start()

    def serve(self, device: UsersDevice) -> None:
        """Look after what users are going to use, from now on."""
        self._users = Volume.discover(device.path)
        self.device = device

    def stop(self) -> None:
        """Take part no more, and leave the path."""
        self._stopping.set()
        self._thread.join()
        if self._part:
            self._fail(self._part, "its guard was stopped")
        self._leave_path()

    def withdraw(self) -> None:
        """Stop, and have other hosts forget this one, but for a device of it that users still have."""
        self.stop()
        with contextlib.suppress(BlockferryError):
            self._index.remove(words.host_key(self._volume, self._host))
            if self.device and self.device.gone:
                self._index.remove(words.device_key(self._volume, self._host))

    def status(self) -> dict[str, Any]:
        """Return what `guard status` says of epochs."""
        part = self._part
        return {
            "epoch": part.epoch.id if part else "",
            "stage": part.report.value if part and part.report else "",
            "path": "direct" if self.device and not self.device.guarded else "guarded",
            "failure": self.index_failure
            or (part.images.failure if part and part.images else "")
            or (self.device.failure if self.device else ""),
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
            self._leave_path()
            self._stopping.wait(_BUSY if self._part and self._part.is_pressed else _IDLE)

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
        is_ready = part is not None or self.device is not None  # else it is in a moment, for which all wait
        if current is None or current.id == self._done or not is_ready:
            return
        if part is None:
            if current.stage is not Stage.PREPARE:
                self._give_up(current.id, "its guard missed the beginning")
                return
            part = self._part = self._new_part(current)
        if part.failure():
            self._fail(part, part.failure())
            return
        report = part.follow(current.stage, self._users, self.device)
        if report:
            self._report(part.epoch.id, report, **part.figures())
            part.report = report
            if report is Report.SEALED:
                part.hand_over()

    def _leave_path(self) -> None:
        """Have users pass the guard by as soon as nothing that they write needs to be logged."""
        if self.device is None or not self.device.guarded or (self._part and self._part.needs_path):
            return
        try:
            if self.device.lasts and not self._device_is_known:
                self._announce()
        except LogIndexError as error:
            self.index_failure = error.message  # nobody would know of them
        else:
            self.device.pass_by()

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
        if self.device and self.device.lasts:
            self._index.put(words.device_key(self._volume, self._host), {"path": self.device.path})
            self._device_is_known = True
        self._index.put(words.host_key(self._volume, self._host), self._about, lasts=words.HEARD_OF)
        self._announced = time.monotonic()

    def _report(self, epoch: str, report: Report, **more: Any) -> None:
        said = {"state": report.value, "process": os.getpid(), **more}
        self._index.put(words.report_key(epoch, self._host), said)
