"""What commands, udev and other processes have to do with the process that keeps a hot restore (`daemon.py`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from blockferry import service
from blockferry.errors import NotNowError, UsageError
from blockferry.hot import attachment, disk


@dataclasses.dataclass(frozen=True)
class Request:
    """What a hot restore is to be."""

    name: str
    reference: str
    snapshot: str
    """As the user named it."""
    log_reference: str = ""
    """Of a set whose log is in another repository: that one."""
    target: str = ""
    buffer: str = ""
    buffer_size: int = 0
    force: bool = False
    rate: float | None = None
    """Bytes a second, at most, for hydration; 0: none, but for what follows somebody who reads in sequence."""
    patience: float = 300.0
    """Seconds for which a repository that does not answer is waited for."""
    threads: int = 0
    """How many reads for hydration are under way at a time; 0: one more than processors."""
    mount: str = ""
    """The directory to mount the disk at; "" for none."""


def socket_path(name: str) -> Path:
    """Return where the process of a hot restore listens."""
    return service.runtime_directory(attachment.KIND) / f"{name}.socket"


def nbd_socket_path(name: str) -> Path:
    """Return where a hot restore's disk is served unless the user says otherwise."""
    return service.runtime_directory(attachment.KIND) / f"{name}.nbd"


def running() -> list[str]:
    """Return the names for which there is a socket."""
    return sorted(path.stem for path in service.runtime_directory(attachment.KIND).glob("*.socket"))


def ask(name: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask the process of a hot restore; raise service.NobodyThereError if there is none."""
    return service.ask(socket_path(name), question, name=name)[0]


def start(request: Request) -> dict[str, Any]:
    """Have a process of its own do what is asked; return its status as soon as the disk can be used."""
    service.make_runtime_directory(attachment.KIND)
    told = json.dumps(dataclasses.asdict(request)).encode() + b"\n"
    said = service.start(["-m", "blockferry.hot.daemon"], socket_path(request.name), name=request.name, told=told)
    same = request.snapshot == "latest" or said["snapshot"].startswith(request.snapshot)
    same_place = (said.get("target", ""), said.get("buffer", "")) == (request.target, request.buffer)
    if not same or not same_place:
        where = f" onto {said['target']}" if said.get("target") else ""
        raise UsageError(
            f"{request.name}: is attached already, as snapshot {said['snapshot']}{where}",
            remedy=f"Give this one another --name, or detach that one: blockferry detach {request.name}",
        )
    return said


def clear_away(name: str) -> None:
    """Take away what a process that was killed has left: its loop device, as soon as nobody uses it, and its socket.

    Its mount goes by itself, or with the next one (`fuse.py`).
    """
    place = socket_path(name)
    with service.only_one(place, taken(name)):
        disk.detach_stale(loop_record(name))
        place.unlink(missing_ok=True)


def loop_record(name: str) -> Path:
    """Return the file that says which loop device shows the disk."""
    return socket_path(name).with_suffix(".loop")


def taken(name: str) -> NotNowError:
    """Return the error for a name whose process runs already."""
    return NotNowError(
        f"{name}: is attached already", remedy=f"Give this one another --name, or: blockferry detach {name}"
    )
