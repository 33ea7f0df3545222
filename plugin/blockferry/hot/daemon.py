"""The process that keeps one hot restore: it shows the disk, fills it, and answers on a socket until it is told to end.

What it is to do comes as a line of JSON on standard input, where a reference may hold credentials; what it opens the
repository with comes in the environment, as for every command.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy

from blockferry import service
from blockferry.chain import Chain, trace
from blockferry.errors import BlockferryError, TargetError, UsageError
from blockferry.groups.stored import refuse_group
from blockferry.hookspecs import CacheOptions
from blockferry.hot import attachment, disk
from blockferry.hot.cache import RestoreCache, TargetCache
from blockferry.hot.client import Request, loop_record, socket_path, taken
from blockferry.hot.export import Exports, Wish
from blockferry.hot.hydration import Hydration
from blockferry.hot.movable import MovableDisk, movable
from blockferry.hot.source import Source
from blockferry.hot.state import block_size_for
from blockferry.joined import repository_with_log
from blockferry.manager import plugin_manager, tell
from blockferry.repository import Repository
from blockferry.snapshot import Snapshot, find

log = logging.getLogger(__name__)

_LOOK_EVERY = 0.2
"""Seconds between two looks at whether all is there."""
_LOOK_RARELY = 2.0
"""The same when all is there: then only the target could be taken away."""
_SMALL_UNIT = 256 << 10
"""Bytes that are fetched for somebody who needs a block, where nothing of a larger chunk is lost by that."""
_TELL_EVERY = 15.0
"""Seconds between two times that plugins are told how far it is."""
_RATE_OVER = 5.0
"""Seconds over which the rate is measured."""


def serve(request: Request) -> None:
    """Show the disk until somebody says `detach`, or SIGTERM or SIGINT comes. Tells systemd when it is there."""
    service.make_runtime_directory(attachment.KIND)
    service.end_by_signals()
    place = socket_path(request.name)
    manager = plugin_manager()
    try:
        with (
            service.only_one(place, taken(request.name)),
            contextlib.closing(repository_with_log(manager, request.reference, request.log_reference)) as repository,
            _restoring(manager, repository, request) as restoring,
            service.listening(place) as listener,
            _mounted(restoring, request.mount),  # may take its time: whoever asks meanwhile is answered then
        ):
            service.notify_systemd("READY=1")
            restoring.keep(listener)
    except service.StopError:
        return


class Restoring:
    """A hot restore that is under way."""

    def __init__(
        self,
        manager: pluggy.PluginManager,
        request: Request,
        snapshot: Snapshot,
        source: Source,
        cache: RestoreCache,
        path: Path,
        shown: MovableDisk,
    ) -> None:
        self.manager = manager
        self.request = request
        self.snapshot = snapshot
        self.source = source
        self.cache = cache
        self.path = path
        self.shown = shown
        scratch = service.runtime_directory(attachment.KIND) / f"{request.name}.nbdkit"
        self.exports = Exports(path.with_name(disk.UNCACHED_NAME), scratch, writable=cache.writable)
        self.began = time.monotonic()
        self.failure = ""
        self.not_mounted = ""
        self.tell_at = 0.0
        self.samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=round(_RATE_OVER / _LOOK_EVERY))
        self.hydration: Hydration | None = None
        if isinstance(cache, TargetCache) and not cache.about.finished:
            self.hydration = Hydration(cache, threads=_threads(request), rate=request.rate)

    def keep(self, listener: socket.socket) -> None:
        """Answer questions, and put the target in its final state when all is there; until service.StopError.

        Returns when the disk has moved to the target.

        Raise TargetError if the target was taken away.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                service.end_if_told()
                busy = self.hydration or self._can_move()
                if selector.select(_LOOK_EVERY if busy else _LOOK_RARELY):
                    service.answer_next(listener, self._answer)
                self._refuse_to_go_on_without_target()
                self.samples.append((time.monotonic(), self.source.bytes_fetched))
                if time.monotonic() >= self.tell_at:
                    self.tell()
                if self.hydration and self.hydration.complete.is_set() and not self.failure:
                    self._finish()
                if self._can_move():
                    self._move()
                if self.shown.moved:
                    return

    def tell(self, *, ended: bool = False) -> None:
        """Tell systemd and plugins how far it is."""
        self.tell_at = time.monotonic() + _TELL_EVERY
        said = self.status()
        share = 100 * said.get("hydrated", 0) // (said.get("total") or 1)
        service.notify_systemd(f"STATUS=snapshot {self.snapshot.id} at {self.shown.device}, {share} % there")
        tell(self.manager.hook.blockferry_restore_progress, statistics=said, ended=ended)

    def _refuse_to_go_on_without_target(self) -> None:
        """End if the target is gone, so that it can be taken up again when it is back."""
        if isinstance(self.cache, TargetCache) and self.cache.target.is_gone():
            raise TargetError(
                f"{self.cache.about.target}: was taken away",
                remedy="Plug it in again: the restore can be gone on with.",
            )

    def _finish(self) -> None:
        cache = self.cache
        assert isinstance(cache, TargetCache)  # noqa: S101  # only that is hydrated
        try:
            cache.finish()
        except BlockferryError as error:
            self.failure = error.message
            log.error("%s", error)
            return
        self.hydration = None
        log.info("%s: all of snapshot %s is there", cache.about.target, self.snapshot.id)
        self.manager.hook.blockferry_restore_finished(
            snapshot=self.snapshot, target=cache.about.target, statistics=self.status()
        )

    def _can_move(self) -> bool:
        """Tell whether the disk can be led to the target now: who is connected from elsewhere would be cut off."""
        finished = isinstance(self.cache, TargetCache) and self.cache.about.finished
        return finished and self.shown.is_movable and not self.exports.status()

    def _move(self) -> None:
        """Lead the disk to the target; we are not needed any more then."""
        assert isinstance(self.cache, TargetCache)  # noqa: S101  # only that is ever finished
        try:
            self.shown.move(self.cache)
        except BlockferryError as error:
            self.shown.is_movable = False
            log.warning("%s; the disk stays where it is until it is detached", error)

    def _answer(self, question: dict[str, Any]) -> service.Answer:
        match question.get("do"):
            case "status":
                return self.status(), b""
            case "serve":
                return self.exports.serve(Wish(**question["wish"])).status(), b""
            case "stop serving":
                return {"stopped": self.exports.stop()}, b""
            case "detach":
                users = [*self.shown.users(), *self.exports.users()]
                if users and not question.get("force"):
                    told = f"{self.request.name}: in use: {'; '.join(users)}"
                    raise service.DeclinedError(told, remedy="Unmount it, here and on the hosts that are connected.")
                if not question.get("force"):
                    self.cache.sync()  # who detaches is told if that fails
                # Ends the main thread's loop once the answer is on its way.
                threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
                return self.status(), b""
        raise service.DeclinedError("not a question that this version knows")

    def status(self) -> dict[str, Any]:
        """Return the figures that `attach --json` and `status --json` print; sizes in bytes."""
        said: dict[str, Any] = {
            "name": self.request.name,
            "snapshot": self.snapshot.id,
            "device": self.shown.device,
            "path": os.fspath(self.path),
            "size": self.cache.size,
            "seconds": round(time.monotonic() - self.began, 3),
            "unit": self.source.unit,
            "fetched": self.source.bytes_fetched,
            "rate": self._rate(),
            "repository": "waiting" if self.source.down_since else "reachable",
            "exports": self.exports.status(),
            "process": os.getpid(),
        }
        said |= self.cache.status()
        writing = self.hydration.failure() if self.hydration else ""
        said["failure"] = self.failure or said.get("failure") or writing or self.not_mounted
        return said | {"unreadable": self._unreadable()}

    def _rate(self) -> int:
        """Return how many bytes a second were fetched lately."""
        if len(self.samples) < 2:
            return 0
        (began, before), (ended, after) = self.samples[0], self.samples[-1]
        return round((after - before) / (ended - began))

    def _unreadable(self) -> list[list[int]]:
        """Return (start, length) of what could not be had."""
        numbers = set(self.source.damaged) | set(self.hydration.unreadable() if self.hydration else [])
        if isinstance(self.cache, TargetCache):
            numbers = {number for number in numbers if not self.cache.is_whole(number)}
        return [[number * self.source.unit, self.source.length(number)] for number in sorted(numbers)]


@contextlib.contextmanager
def _restoring(manager: pluggy.PluginManager, repository: Repository, request: Request) -> Iterator[Restoring]:
    """Open the snapshot and the cache, show the disk, and hydrate it, for the length of the context."""
    listed = repository.snapshots()
    snapshot = find(listed, _named(request))
    chain = trace(repository, snapshot, listed)
    record = chain.newest.record
    refuse_group(record)
    with (
        contextlib.closing(_source(repository, chain, request)) as source,
        _cache(manager, source, _options(repository, chain, request)) as cache,
        disk.shown(cache, request.name) as path,
        disk.loop_device(
            path, loop_record(request.name), block_size=record.block_size, read_only=not cache.writable
        ) as loop,
        movable(request.name, loop, cache.size, wanted=isinstance(cache, TargetCache)) as shown,
    ):
        restoring = Restoring(manager, request, snapshot, source, cache, path, shown)
        if restoring.hydration:
            restoring.hydration.start()
        try:
            yield restoring
        finally:
            restoring.tell(ended=True)
            restoring.exports.stop()
            source.stop_waiting()
            if restoring.hydration:
                restoring.hydration.stop()


@contextlib.contextmanager
def _mounted(restoring: Restoring, directory: str) -> Iterator[None]:
    """Mount the disk if that is asked for. One that cannot be mounted is brought back all the same."""
    if not directory:
        yield
        return
    failure = restoring.not_mounted = disk.mount(restoring.shown.device, directory)
    if failure:
        log.error("%s: %s", restoring.request.name, failure)
    try:
        yield
    finally:
        # One that has moved to its target stays mounted.
        if not failure and not restoring.shown.moved:
            disk.unmount(restoring.shown.device, directory)


def _named(request: Request) -> str:
    """Return the snapshot that is meant: `latest` is the one that is being restored already, if one is."""
    known = attachment.load(request.name) if request.target else None
    same_target = known is not None and known.target == request.target
    return known.snapshot if known and same_target and request.snapshot == "latest" else request.snapshot


def _source(repository: Repository, chain: Chain, request: Request) -> Source:
    """Return the snapshot's image, read by one more reader than hydration has: who waits need not wait for it."""
    record, shared = chain.newest.record, "parallel" in repository.capabilities
    return Source(
        chain.open(repository),
        lambda: chain.open(repository),
        # A reader that is asked for several things at a time keeps what it had to unpack for the first.
        max(_SMALL_UNIT, 8 * block_size_for(record.size)) if shared else record.unit,
        readers=_threads(request) + 1,
        patience=request.patience,
        shared=shared,
    )


def _threads(request: Request) -> int:
    """Return how many reads for hydration are to be under way: while one is written others are unpacked."""
    return request.threads or (os.cpu_count() or 1) + 1


def _options(repository: Repository, chain: Chain, request: Request) -> CacheOptions:
    record = chain.newest.record
    return CacheOptions(
        name=request.name,
        repository=repository.reference,
        snapshot=chain.newest.snapshot.id,
        target=request.target,
        block_size=record.block_size,
        zeros_are_content=record.zeros_are_content,
        force=request.force,
        buffer=request.buffer,
        buffer_size=request.buffer_size,
    )


def _cache(
    manager: pluggy.PluginManager, source: Source, options: CacheOptions
) -> contextlib.AbstractContextManager[RestoreCache]:
    opened: contextlib.AbstractContextManager[RestoreCache] | None
    opened = manager.hook.blockferry_restore_cache(source=source, options=options)
    if opened is None:
        raise UsageError("nowhere to restore to", remedy="Name a target, or a directory for a --buffer.")
    return opened


if __name__ == "__main__":
    # The working directory stays: a repository, or the file with its password, may be named from there.
    sys.exit(service.run_apart(lambda: serve(Request(**json.loads(sys.stdin.readline())))))
