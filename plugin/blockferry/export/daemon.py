"""The process that keeps an export: volumes held still, their files shown, until somebody releases it.

It ends by itself when it is as old as it may become, when its files are unmounted, and when it is told to end by a
signal; whoever releases it then is told so. A mount whose process was killed stays, and every read of it fails: were it
taken away, a job in the middle would find nothing there to read, and be content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import selectors
import socket
import sys
import syslog
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blockferry import service
from blockferry.difference import Choice
from blockferry.directory import IMAGE, RECORD, SEGMENTS
from blockferry.errors import BlockferryError
from blockferry.export.client import Request, taken
from blockferry.export.note import KIND
from blockferry.export.road import shown
from blockferry.export.spool import shown_group
from blockferry.export.tree import ExportTree
from blockferry.export.view import View
from blockferry.fuse import mounted_on
from blockferry.groups.definition import Group
from blockferry.manager import plugin_manager
from blockferry.progress import Silent
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_LOOK_EVERY = 2.0
"""Seconds between two looks at whether the volumes still hold still."""


def serve(request: Request) -> None:
    """Show the volumes until somebody says `release`."""
    service.make_runtime_directory(KIND)
    service.end_by_signals()
    manager, note = plugin_manager(), request.note
    choice = Choice(since=request.since, tracker=request.tracker)
    with service.only_one(note.socket, taken(request.at)), contextlib.ExitStack() as held:
        note.save()
        held.enter_context(_forgotten_on_failure(request))
        views = [
            held.enter_context(
                shown(manager, Volume.discover(path, name), allow_live=request.allow_live, choice=choice)
            )
            for name, path in request.volumes
        ]
        for each in request.groups:
            group = Group.from_json(each)
            views.append(held.enter_context(shown_group(manager, group, since=request.since, progress=Silent())))
        tree = ExportTree(views, as_segments=request.as_segments)
        server = held.enter_context(mounted_on(tree, Path(request.at), stays_dead=True))
        listener = held.enter_context(service.listening(note.socket))
        ended = Export(request, views, server).keep(listener)
        if ended:
            dataclasses.replace(note, ended=ended).save()
            _tell(f"{request.at}: {ended}")


class Export:
    """An export that is under way."""

    def __init__(self, request: Request, views: Sequence[View], server: threading.Thread) -> None:
        self.request = request
        self.views = views
        self.server = server
        self.began = _clock()
        self.released = False

    def keep(self, listener: socket.socket) -> str:
        """Answer questions until it is over; return why it is, "" if it was released."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            try:
                while not self.released:
                    service.end_if_told()
                    if selector.select(min(_LOOK_EVERY, max(0.0, self._left()))):
                        service.answer_next(listener, self._answer)
                    if not self.server.is_alive():
                        return "somebody unmounted it"
                    if not self.released and self._left() <= 0:
                        return f"nobody released it within {self.request.max_age / 3600:g} hours"
                    for view in self.views:
                        view.check()
            except service.StopError:
                return "what kept it was told to end by a signal"
        return ""

    def _left(self) -> float:
        """Return for how many seconds it may go on."""
        return self.began + self.request.max_age - _clock()

    def _answer(self, question: dict[str, Any]) -> service.Answer:
        match question.get("do"):
            case "status":
                return self.status(), b""
            case "release":
                for view in self.views:
                    view.check()
                self.released = True
                return self.status(), b""
        raise service.DeclinedError("not a question that this version knows")

    def status(self) -> dict[str, Any]:
        """Return the figures that `export --json` and `release --json` print."""
        at = Path(self.request.at)
        ending = SEGMENTS if self.request.as_segments else IMAGE
        volumes = []
        for view in self.views:
            files = {"record": str(at / (view.name + RECORD)), "content": str(at / (view.name + ending))}
            volumes.append(view.status() | files)
        failures = [f"{view.name}: {view.failure}" for view in self.views if view.failure]
        return {
            "id": self.request.id,
            "at": self.request.at,
            "as": "segments" if self.request.as_segments else "image",
            "volumes": volumes,
            "bytes_read": sum(view.bytes_read for view in self.views),
            "failure": "; ".join(failures),
            "seconds": round(_clock() - self.began, 3),
            "ends_in": round(self._left()),
        }


@contextlib.contextmanager
def _forgotten_on_failure(request: Request) -> Iterator[None]:
    """Forget the export if it fails before, or while, it is shown; the mount, if there is one, is gone by then."""
    try:
        yield
    except BaseException:
        request.note.forget()
        raise


def _clock() -> float:
    """Return seconds that also pass while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _tell(words: str) -> None:
    """Say something in the journal."""
    log.warning("%s", words)
    syslog.openlog("blockferry", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, words)


def _serve_told() -> None:
    """Serve what standard input says."""
    try:
        serve(Request.from_json(sys.stdin.readline()))
    except service.StopError:
        raise BlockferryError("it was told to end by a signal") from None


if __name__ == "__main__":
    # The working directory stays: an image may be named from there.
    sys.exit(service.run_apart(_serve_told))
