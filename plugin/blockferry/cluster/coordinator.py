"""The coordinator's side of an epoch: it has all hosts go through the stages, watches them, and takes their logs."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockferry.cluster import epoch as words
from blockferry.cluster.epoch import Epoch, Report, Stage
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log import LogLayer
from blockferry.cluster.log_writer import LogWriter
from blockferry.cluster.part import PLACE
from blockferry.errors import BlockferryError, EpochError, NotNowError, UsageError

_LOOK_EVERY = 0.005
"""Seconds between two looks at the reports while users wait."""
_WATCH_EVERY = 0.5
_PATIENCE_FOR_LOGS = 60.0
"""Seconds in which some piece of a log has to come."""
_PATIENCE_TO_SEAL = 30.0
_PATIENCE_TO_WRITE_OUT = 120.0
"""Nobody waits meanwhile, unless a filesystem is frozen."""
_PATIENCE_TO_HOLD = words.HELD - 0.5
"""Seconds while users wait. Less than until hosts let go by themselves: here it is known which of them is missing."""


def hosts_of(index: LogIndex, volume: str) -> dict[str, dict[str, Any]]:
    """Return the guards of a volume that are alive, by host."""
    key = words.host_key(volume)
    return {found.removeprefix(key).removesuffix("/"): about for found, about in sorted(index.list(key).items())}


def unguarded_hosts(index: LogIndex, volume: str) -> list[str]:
    """Return the hosts whose users may be writing to a volume without a guard: it was killed, and they go on."""
    key = words.device_key(volume)
    there = {found.removeprefix(key).removesuffix("/") for found in index.list(key)}
    return sorted(there - hosts_of(index, volume).keys())


def progress_of(index: LogIndex, volume: str) -> tuple[Epoch | None, dict[str, dict[str, Any]]]:
    """Return the epoch of a volume that is under way, None if there is none, and what each host reports of it."""
    said = index.get(words.epoch_key(volume))
    if said is None:
        return None, {}
    epoch = Epoch.from_json(said)
    return epoch, _reports_of(index, epoch.id)


def _reports_of(index: LogIndex, epoch: str) -> dict[str, dict[str, Any]]:
    key = words.report_key(epoch)
    return {found.removeprefix(key): said for found, said in sorted(index.list(key).items())}


class Coordinator:
    """One epoch. Once it has failed, `check` raises why, and nothing of it counts."""

    def __init__(self, index: LogIndex, volume: str, size: int, hosts: Sequence[str]) -> None:
        self.epoch = Epoch(secrets.token_hex(6), Stage.PREPARE, tuple(hosts))
        self.size = size
        self.began = 0.0
        """When users may have begun to wait (monotonic clock)."""
        self._index, self._volume = index, volume
        self._failure = ""
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="epoch", daemon=True)

    @property
    def filesystems_still(self) -> bool:
        """Whether filesystems are mounted behind the guards, and every one of them holds still, not just its device."""
        reports = self._reports()
        return self._frozen(reports) and not any(each.get("remarks") for each in reports.values())

    def check(self) -> None:
        """Raise EpochError if the epoch is void."""
        if self._failure:
            raise EpochError(self._failure)

    def begin(self) -> None:
        """Have all hosts write out what is dirty, and their guards come into the path.

        Raise NotNowError if another backup of the volume is under way, or a guard has just come.
        """
        if not self._index.put(self._key, self.epoch.as_json(), new=True, lasts=words.HEARD_OF):
            raise NotNowError(
                f"{self._volume}: another backup of it is running, or ended a few seconds ago without a word",
                remedy="Try again when it is done.",
            )
        self._watcher.start()
        if new := hosts_of(self._index, self._volume).keys() - set(self.epoch.hosts):
            # It may have looked for an epoch before ours was there, and not be in its users' path.
            raise NotNowError(f"{', '.join(sorted(new))}: its guard was started just now", remedy="Try again.")
        self._wait_for(Report.READY, _PATIENCE_TO_WRITE_OUT)

    def hold(self) -> None:
        """Have all hosts freeze their filesystems and hold their writes."""
        self.began = time.monotonic()
        self._tell(Stage.FREEZE)
        self._wait_for(Report.QUIET, _PATIENCE_TO_WRITE_OUT)
        if not self._frozen(self._reports()):
            self.began = time.monotonic()
        self._tell(Stage.HOLD)
        self._wait_for(Report.HELD, _PATIENCE_TO_HOLD)

    def open(self) -> None:
        """Make this the instant: what is written from here on is logged. Return when all hosts know."""
        self._index.open_claims(words.claims_of(self.epoch.id))
        self._tell(Stage.OPEN)
        self._wait_for(Report.LOGGING, words.HELD)

    def seal(self) -> None:
        """Have all hosts stop logging."""
        self.check()
        # First: hosts stop one after the other, and what one overwrites then must not be logged by another.
        self._index.close_claims(words.claims_of(self.epoch.id))
        self._tell(Stage.SEAL)
        self._wait_for(Report.SEALED, _PATIENCE_TO_SEAL)

    def gather(self, path: Path, advance: Callable[[int], None]) -> LogLayer:
        """Take the logs of all hosts, and return them edited to one, in a new file.

        Raise EpochError if an image is missing, or there twice.
        """
        reports = self._reports()
        with contextlib.closing(LogWriter(path, chunk=self.epoch.chunk, size=self.size)) as writer:
            for host in reports:
                got = self._gather_from(host, writer, advance)
                claimed = np.sort(self._index.claimed(words.claims_of(self.epoch.id), host))
                if not np.array_equal(np.sort(got), claimed):
                    raise EpochError(f"{host}: its log does not hold just the {claimed.size} chunks that it claimed")
        self.check()
        return LogLayer(path, self.size)

    def end(self) -> None:
        """Take the epoch out of the index."""
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with contextlib.suppress(BlockferryError):  # it goes by itself in a while
            said = self._index.get(self._key)
            if said and said.get("id") == self.epoch.id:
                self._index.remove(self._key)
            self._index.remove(words.below(self.epoch.id))

    @property
    def _key(self) -> str:
        return words.epoch_key(self._volume)

    def _tell(self, stage: Stage) -> None:
        with self._turn:
            self.epoch = Epoch(self.epoch.id, stage, self.epoch.hosts, self.epoch.chunk)
            self._index.put(self._key, self.epoch.as_json(), lasts=words.HEARD_OF)

    def _reports(self) -> dict[str, dict[str, Any]]:
        return _reports_of(self._index, self.epoch.id)

    def _wait_for(self, report: Report, seconds: float) -> None:
        """Wait until every host, also one that came later, has reported so much; EpochError if one does not."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            reports = self._reports()
            self._refuse_failed(reports)
            missing = [host for host in {*self.epoch.hosts, *reports} if _state(reports, host) != report.value]
            if not missing:
                return
            if report is Report.QUIET and self._frozen(reports):
                deadline = min(deadline, self.began + _PATIENCE_TO_HOLD)
            if time.monotonic() > deadline:
                raise EpochError(f"{', '.join(sorted(missing))}: did not report `{report}` in time")
            time.sleep(_LOOK_EVERY)

    def _watch(self) -> None:
        """Renew the epoch, and look after the hosts, until it is over."""
        renewed = time.monotonic()
        while not self._over.wait(_WATCH_EVERY):
            try:
                if time.monotonic() - renewed > words.RENEWED:
                    with self._turn:
                        self._index.put(self._key, self.epoch.as_json(), lasts=words.HEARD_OF)
                    renewed = time.monotonic()
                reports = self._reports()
                self._refuse_failed(reports)
                gone = {*self.epoch.hosts, *reports} - hosts_of(self._index, self._volume).keys()
                if gone:
                    raise EpochError(f"{', '.join(sorted(gone))}: nothing is heard of its guard any more")
            except BlockferryError as error:
                self._failure = error.message
                return

    @staticmethod
    def _frozen(reports: dict[str, dict[str, Any]]) -> bool:
        return any(said.get("frozen") for said in reports.values())

    def _refuse_failed(self, reports: dict[str, dict[str, Any]]) -> None:
        for host, said in reports.items():
            if said.get("state") == Report.FAILED.value:
                raise EpochError(f"{host}: {said.get('reason')}")

    def _gather_from(self, host: str, writer: LogWriter, advance: Callable[[int], None]) -> np.ndarray:
        """Write one host's log to the entire one; return the chunks that it had."""
        taken, total = [np.empty(0, np.int64)], 0
        for offset, data in self._pieces(host):
            if not data:
                if offset != total:
                    raise EpochError(f"{host}: {offset} bytes of its log were sent, {total} came")
                return np.concatenate(taken)
            chunk = writer.chunk
            last = offset + len(data) == self.size
            if offset % chunk or (len(data) % chunk and not last) or offset + len(data) > self.size:
                raise EpochError(
                    f"{host}: its log has {len(data)} bytes at {offset}, which are no chunks of the volume"
                )
            numbers = np.arange(offset // chunk, -(-(offset + len(data)) // chunk))
            writer.append(numbers, [data[place : place + chunk] for place in range(0, len(data), chunk)])
            taken.append(numbers)
            total += len(data)
            advance(len(data))
        raise EpochError(f"{host}: its log did not come to its end")

    def _pieces(self, host: str) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of what a host sends, the end included; EpochError if nothing comes any more."""
        queue = words.log_queue(self.epoch.id, host)
        while True:
            deadline = time.monotonic() + _PATIENCE_FOR_LOGS
            while (piece := self._index.pop(queue, 1.0)) is None:
                self.check()
                if time.monotonic() > deadline:
                    raise EpochError(f"{host}: its log does not come")
            if len(piece) < PLACE.size:
                raise EpochError(f"{host}: what it sends is no log")
            yield PLACE.unpack_from(piece)[0], memoryview(piece)[PLACE.size :]


@contextlib.contextmanager
def coordinated(index: LogIndex, volume: str, size: int, wanted: Sequence[str]) -> Iterator[Coordinator]:
    """Give an epoch of all hosts whose guards are there, for the length of the context.

    Raise UsageError if there are none, or one that is wanted is missing, was killed, or sees a volume of another size.
    """
    # An index that is full has forgotten the guards by and by: it says so here, and not that there are none.
    index.put(words.asked_key(volume), {}, lasts=words.RENEWED)
    if unguarded := unguarded_hosts(index, volume):
        raise UsageError(
            f"{volume}: may be written to on {', '.join(unguarded)}, where its guard was killed",
            remedy="Start it there: blockferry guard start. If that host is gone for good: blockferry cluster forget",
        )
    hosts = hosts_of(index, volume)
    if missing := set(wanted) - hosts.keys():
        raise UsageError(
            f"{volume}: no guard runs on {', '.join(sorted(missing))}", remedy="Start it there: blockferry guard start"
        )
    if not hosts:
        raise UsageError(
            f"{volume}: no host has a guard in front of it", remedy="On each: blockferry guard start VOLUME --index URL"
        )
    if odd := [host for host, about in hosts.items() if about.get("size") != size]:
        raise UsageError(f"{volume}: has another size on {', '.join(odd)}", remedy="Is it the same device?")
    coordinator = Coordinator(index, volume, size, list(hosts))
    try:
        coordinator.begin()
        yield coordinator
    finally:
        coordinator.end()


def _state(reports: dict[str, dict[str, Any]], host: str) -> str:
    return str(reports.get(host, {}).get("state", ""))
