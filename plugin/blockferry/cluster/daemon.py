"""The process that is the guard of one shared volume on one host: it shows a disk in front of it until told to end."""

from __future__ import annotations

import contextlib
import dataclasses
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

from blockferry import service
from blockferry.cluster import shared_device, users_device
from blockferry.cluster.guard import Guard, Logged
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log_writer import make_room
from blockferry.cluster.member import Member
from blockferry.cluster.users_device import UsersDevice
from blockferry.cluster.write_back import WriteBack
from blockferry.errors import NotNowError, UsageError
from blockferry.hot import disk
from blockferry.manager import log_index_named, plugin_manager
from blockferry.state import state_directory
from blockferry.volume import Volume

log = logging.getLogger(__name__)

KIND = "guard"
_LOOK_EVERY = 1.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What a guard is to be."""

    name: str
    """What the volume is called on all hosts."""
    volume: str
    """Its path on this one."""
    index: str
    host: str
    buffer: int = 0
    """Bytes that are acknowledged before they are on the volume, at most."""
    log_room: int = 256 << 20
    """Bytes of a log that are made beforehand: it is written faster then."""


def socket_path(name: str) -> Path:
    """Return where the guard of a volume listens."""
    return service.runtime_directory(KIND) / f"{name}.socket"


def link_path(name: str) -> Path:
    """Return the name under which the guard's disk can be mounted: loop devices have another number every time."""
    return service.runtime_directory(KIND) / f"{name}.disk"


def running() -> list[str]:
    """Return the names for which there is a socket."""
    return sorted(path.stem for path in service.runtime_directory(KIND).glob("*.socket"))


def ask(name: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask a guard; raise service.NobodyThereError if there is none."""
    return service.ask(socket_path(name), question, name=name)[0]


def start(request: Request) -> dict[str, Any]:
    """Have a process of its own do what is asked; return its status as soon as the disk can be used."""
    service.make_runtime_directory(KIND)
    told = json.dumps(dataclasses.asdict(request)).encode() + b"\n"
    said = service.start(["-m", __name__], socket_path(request.name), name=request.name, told=told)
    if (said["volume"], said["host"]) != (request.volume, request.host):
        raise UsageError(
            f"{request.name}: a guard of that name runs already, in front of {said['volume']}",
            remedy="Give this one another --name.",
        )
    return said


def clear_away(name: str, *, force: bool) -> bool:
    """Take away what a guard that was killed has left; return whether the index still knows of that.

    Raise UsageError if somebody uses its device, and no `force`.
    """
    with service.only_one(socket_path(name), taken(name)):
        is_known = users_device.remove_left_over(name, force=force)
        disk.detach_stale(socket_path(name).with_suffix(".loop"))
        link_path(name).unlink(missing_ok=True)
        socket_path(name).unlink(missing_ok=True)
    return is_known


def taken(name: str) -> NotNowError:
    """Return the error for a name whose guard runs already."""
    return NotNowError(f"{name}: its guard runs already", remedy=f"blockferry guard status {name}")


def serve(request: Request) -> None:
    """Show the disk until somebody says `stop`, or SIGTERM or SIGINT comes. Tells systemd when it is there."""
    service.make_runtime_directory(KIND)
    service.end_by_signals()
    place = socket_path(request.name)
    try:
        with (
            service.only_one(place, taken(request.name)),
            contextlib.closing(log_index_named(plugin_manager(), request.index)) as index,
            _guarding(request, index) as guarding,
            service.listening(place) as listener,
        ):
            service.notify_systemd("READY=1")
            guarding.keep(listener)
    except service.StopError:
        return


class Guarding:
    """A guard that is in front of its volume."""

    def __init__(self, request: Request, index: LogIndex, guard: Guard, member: Member, device: UsersDevice) -> None:
        self.request, self.index, self.guard, self.member, self.device = request, index, guard, member, device
        self.began = time.time()

    def keep(self, listener: socket.socket) -> None:
        """Answer questions, until service.StopError."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                service.end_if_told()
                if selector.select(_LOOK_EVERY):
                    service.answer_next(listener, self._answer)

    def _answer(self, question: dict[str, Any]) -> service.Answer:
        match question.get("do"):
            case "status":
                return self.status(), b""
            case "stop":
                if (users := self.device.users()) and not question.get("force"):
                    raise service.DeclinedError(
                        f"{self.request.name}: in use: {'; '.join(users)}", remedy="Unmount it, or use --force."
                    )
                # Ends the main thread's loop once the answer is on its way.
                threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
                return self.status(), b""
        raise service.DeclinedError("not a question that this version knows")

    def status(self) -> dict[str, Any]:
        """Return what `guard start --json` and `guard status --json` print."""
        return {
            "name": self.request.name,
            "volume": self.request.volume,
            "host": self.request.host,
            "index": self.index.reference,
            "device": self.device.path,
            "link": os.fspath(link_path(self.request.name)),
            "since": round(self.began, 3),
            "process": os.getpid(),
            **self.guard.status(),
            **self.member.status(),
        }


@contextlib.contextmanager
def _guarding(request: Request, index: LogIndex) -> Iterator[Guarding]:
    """Stand in front of the volume, and follow its epochs, for the length of the context."""
    volume = Volume.discover(request.volume, request.name)
    spool = state_directory() / KIND / f"{request.name}.log"
    spool.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_room(spool, request.log_room)
    record = socket_path(request.name).with_suffix(".loop")
    about = {"volume": request.name, "host": request.host, "path": volume.path, "size": volume.size}
    with shared_device.opened(volume) as device, contextlib.ExitStack() as held:
        logged = Logged(device)
        buffer = held.enter_context(contextlib.closing(WriteBack(logged, request.buffer))) if request.buffer else None
        guard = Guard(logged, buffer or logged)
        member = Member(guard, device, index, about, spool)
        buffered = bool(request.buffer)
        late = users_device.take_over(request.name, volume, buffered=buffered)
        # Before anybody can write: whoever comes while a backup runs takes part in it.
        member.start(late=late)
        held.callback(member.withdraw)
        path = held.enter_context(disk.shown(guard, f"guard-{request.name}"))
        loop = held.enter_context(disk.loop_device(path, record, block_size=volume.block_size, read_only=False))
        shown = held.enter_context(users_device.shown(request.name, volume, loop, buffered=buffered))
        member.serve(shown)
        held.callback(member.stop)  # as long as there is something that it can leave the path of
        link = link_path(request.name)
        link.unlink(missing_ok=True)
        link.symlink_to(shown.path)
        held.callback(link.unlink, missing_ok=True)
        yield Guarding(request, index, guard, member, shown)


if __name__ == "__main__":
    # The working directory stays: a repository, or the file with its password, may be named from there.
    sys.exit(service.run_apart(lambda: serve(Request(**json.loads(sys.stdin.readline())))))
