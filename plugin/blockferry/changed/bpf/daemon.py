"""The process that tracks one device, and why no write falls between two checkpoints.

    time ->      checkpoint 4      freeze  changed(4)    checkpoint 5    freeze  changed(4)
    generation 3 ------------------------- end
               4        ------------------------------------------------------- end
               5                                              -------------------------------...

A checkpoint is the number of a generation, a bpftrace process (`program`), given out when that one is attached. The one
before it goes on until it is asked about, which is after the volume was made to hold still, so generations overlap:

- Generation N+1 is attached before N is detached, always. So each write since N was attached is in N or in a later one.
- `changed(since=N)` is the union of N and all later generations but the newest, which goes on. The last of those in
  the union is ended while the question is being answered, so it holds every write until then: also those until the
  freeze, which came before the question. If there is none to be ended (N is the newest, or somebody asked before), a
  new one is begun first.
- A generation's map is read after it is detached, so reading never races with noting.
- Now and then a generation is begun that no checkpoint names, and the one before is ended: the map that is left to be
  read while a volume is held still is then a small one, and what is written again and again takes up less room.

A write that was under way when generation N was attached was queued before and is not in N. It has ended before the
data of N's snapshot is read, for making a volume hold still waits for it. Not so with `--allow-live`: there, a write
that takes longer than the backup takes to come to its block may be missed, as it may in that snapshot itself.

Where anything is lost (`LostError`, a device that is not the same any more) all generations until then are void, and
every checkpoint among them is declined, with the reason. The next checkpoint begins anew. All is in memory and bears
the random name of this process's session: nothing can be taken up again after a crash, a stop or a reboot, by mistake
or otherwise. What ended generations noted is kept until no checkpoint needs it, and in all at most 8 million extents,
128 MB; then the oldest checkpoints are given up.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import secrets
import selectors
import socket
import sys
import time
from typing import Any

from blockferry import service
from blockferry.changed.bpf import protocol
from blockferry.changed.bpf.device import Device, Numbers, numbers_of, uevents
from blockferry.changed.bpf.program import Generation, LostError, require
from blockferry.errors import BlockferryError, NotNowError
from blockferry.extents import ExtentSet

log = logging.getLogger(__name__)

_LOOK_EVERY = 2.0
"""Seconds between two looks at whether all is well: each wrong event makes bpftrace write a line."""
_RENEW_AFTER = 900.0
"""Seconds for which a generation may be the newest. Reading a full map takes seconds, starting bpftrace one."""
_MOST_EXTENTS = 8_000_000


class Tracking:
    """The generations and checkpoints of one device. Used by one thread."""

    def __init__(self, path: str, numbers: Numbers) -> None:
        """Begin the first generation; raise BlockferryError if the device cannot be tracked."""
        self.path = path
        self.numbers = numbers
        self.session = secrets.token_hex(8)
        self.began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.number = 0
        self.running: list[Generation] = []
        self.ended: dict[int, ExtentSet] = {}
        self.checkpoints: set[int] = set()
        self.void_until = 0
        self.void_because = ""
        self.renew_after = float(os.environ.get("BLOCKFERRY_BPF_RENEW_AFTER", _RENEW_AFTER))
        self.began_newest = 0.0
        self.device = Device.examine(numbers)
        self._begin()

    def checkpoint(self) -> dict[str, Any]:
        """Begin a generation, and return the checkpoint that it is."""
        self.look()
        self._begin()
        while len(self.running) > 2:
            self._end(self.running[0])
        self.checkpoints.add(self.number)
        return {"session": self.session, "generation": self.number, "device": list(self.numbers)}

    def changed(self, session: object, since: int) -> ExtentSet:
        """Return all that was written since a checkpoint until now; raise DeclinedError if that is not known."""
        self.look()
        self._refuse_unknown(session, since)
        if len(self.running) < 2 or self.running[-1].number == since:
            self._begin()
        self._end_older()
        self.look()
        self._refuse_unknown(session, since)
        return ExtentSet.empty().union(*(extents for number, extents in self.ended.items() if number >= since))

    def release(self, session: object, number: int) -> None:
        """Forget a checkpoint."""
        if session == self.session:
            self.checkpoints.discard(number)
            self._tidy()

    def look(self) -> None:
        """Find out whether the device is the same, and each generation whole; declare void what is not."""
        with contextlib.suppress(BlockferryError):
            self._look_at_device()
        for generation in list(self.running):
            reason = generation.trouble()
            if reason:
                self._void(generation.number, reason)

    def renew(self) -> None:
        """Begin a generation if the newest is old."""
        if self.running and time.monotonic() - self.began_newest > self.renew_after:
            with contextlib.suppress(BlockferryError):  # the old one goes on
                self._begin()
                self._end_older()

    def status(self) -> dict[str, Any]:
        """Return what is known of all this, for people."""
        self.look()
        return {
            "volume": self.path,
            "device": f"{self.numbers[0]}:{self.numbers[1]}",
            "session": self.session,
            "since": self.began,
            "checkpoints": len(self.checkpoints),
            "extents": sum(map(len, self.ended.values())),
            "lost": self.void_because,
            "process": os.getpid(),
        }

    def close(self) -> None:
        """End everything."""
        for generation in self.running:
            generation.abandon()

    def _refuse_unknown(self, session: object, since: int) -> None:
        if session != self.session:
            raise service.DeclinedError("tracking was stopped and started again since that snapshot")
        if since <= self.void_until:
            raise service.DeclinedError(self.void_because)
        if since not in self.checkpoints:
            raise service.DeclinedError("what was written since that snapshot is not kept any more")

    def _look_at_device(self) -> None:
        """Declare all void if the device is not what it was; raise BlockferryError if it cannot be tracked now."""
        try:
            now = Device.examine(self.numbers)
        except BlockferryError as error:
            self._void(self.number, error.message)
            raise
        reason = self.device.difference(now)
        if reason:
            self._void(self.number, reason)
        self.device = now

    def _begin(self) -> None:
        self._look_at_device()
        self.running.append(Generation(self.number + 1, self.device))
        self.number += 1
        self.began_newest = time.monotonic()

    def _end_older(self) -> None:
        for generation in self.running[:-1]:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        """End a generation and keep what it noted, if a checkpoint needs it. A newer one runs by now."""
        if generation.number < min(self.checkpoints, default=self.number):
            generation.abandon()
            self.running.remove(generation)
            return
        try:
            self.ended[generation.number] = generation.end()
            self.running.remove(generation)
        except LostError as reason:
            self._void(generation.number, str(reason))
        self._tidy()

    def _void(self, until: int, reason: str) -> None:
        """Forget all generations up to one: something that was written is not in them."""
        if until <= self.void_until:
            return
        log.warning("%s: %s: the next backup reads all that is in use", self.path, reason)
        self.void_until, self.void_because = until, reason
        for generation in [each for each in self.running if each.number <= until]:
            generation.abandon()
            self.running.remove(generation)
        self.ended = {number: extents for number, extents in self.ended.items() if number > until}
        self.checkpoints = {number for number in self.checkpoints if number > until}

    def _tidy(self) -> None:
        """Merge each ended generation that no checkpoint begins into the one before; drop what is before them all."""
        kept: dict[int, ExtentSet] = {}
        for number, extents in sorted(self.ended.items()):
            if number in self.checkpoints:
                kept[number] = extents
            elif kept:
                last = next(reversed(kept))
                kept[last] = kept[last].union(extents)
        while sum(map(len, kept.values())) > _MOST_EXTENTS:
            oldest = next(iter(kept))
            self.checkpoints.discard(oldest)
            del kept[oldest]
        self.ended = kept


def serve(path: str) -> None:
    """Track a device until somebody says `stop`, or SIGTERM or SIGINT comes; raise BlockferryError if it cannot be.

    Tells systemd when tracking is on (sd_notify(3)).
    """
    if os.geteuid():
        raise BlockferryError("only root can track a device", remedy="Use sudo.")
    require()
    numbers = numbers_of(path)
    service.make_runtime_directory(protocol.KIND)
    service.end_by_signals()
    taken = NotNowError(f"{path}: is being tracked already", remedy=f"blockferry track stop {path}")
    place = protocol.socket_path(numbers)
    try:
        with (
            service.only_one(place, taken),
            contextlib.closing(Tracking(path, numbers)) as tracking,
            service.listening(place) as listener,
        ):
            service.notify_systemd("READY=1")
            log.info("%s: what is written to it is being tracked", path)
            _answer_all(tracking, listener)
    except service.StopError:
        return


def detach(path: str) -> dict[str, Any]:
    """Have a process of its own track a device; return its status as soon as it does, or if one did already.

    Raise BlockferryError, with what that process said, if the device cannot be tracked.
    """
    numbers = numbers_of(path)
    service.make_runtime_directory(protocol.KIND)
    command = ["-m", "blockferry.changed.bpf.daemon", path]
    return service.start(command, protocol.socket_path(numbers), name=path, credentials=False)


def _answer_all(tracking: Tracking, listener: socket.socket) -> None:
    with selectors.DefaultSelector() as selector, uevents() as devices:
        selector.register(listener, selectors.EVENT_READ)
        # A device-mapper table may say for a moment only that a snapshot is merged back: look as soon as it changes.
        selector.register(devices, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            service.end_if_told()
            ready = [key.fileobj for key, _events in selector.select(max(0.0, due - time.monotonic()))]
            if devices in ready:
                with contextlib.suppress(OSError):  # nothing left, or more was said than there was room for
                    while devices.recv(1 << 16):
                        pass
            if devices in ready or time.monotonic() >= due:  # however many questions come
                tracking.look()
                tracking.renew()
                due = time.monotonic() + _LOOK_EVERY
            if listener in ready:
                asked = service.answer_next(listener, functools.partial(_answer, tracking))
                if asked.get("do") == "stop":
                    raise service.StopError


def _answer(tracking: Tracking, question: dict[str, Any]) -> service.Answer:
    """Return the answer to a question, and the extents that go with it."""
    session, generation = question.get("session"), question.get("generation")
    match question.get("do"):
        case "checkpoint":
            return tracking.checkpoint(), b""
        case "changed" if isinstance(generation, int):
            return {}, protocol.bytes_of(tracking.changed(session, generation))
        case "release" if isinstance(generation, int):
            tracking.release(session, generation)
            return {}, b""
        case "status" | "stop":
            return tracking.status(), b""
    raise service.DeclinedError("not a question that this version knows")


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(service.run_apart(lambda: serve(sys.argv[1])))
