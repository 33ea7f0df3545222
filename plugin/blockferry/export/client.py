"""Beginning an export and ending it, from outside the process that keeps it (`daemon.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy

from blockferry import fuse, service
from blockferry.errors import BlockferryError, NotNowError, TargetError
from blockferry.export import job
from blockferry.export.note import KIND, Note, load_all
from blockferry.manager import tell
from blockferry.state import state_directory

_KILLED = "what kept it was killed"
_PATIENCE = 5.0
"""Seconds in which a process that was killed is gone: it lets go of its socket first, of its lock last."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be exported."""

    at: str
    volumes: tuple[tuple[str, str], ...]
    """Name and path of each."""
    groups: tuple[dict[str, Any], ...] = ()
    """Groups of files, as their records have them."""
    as_segments: bool = True
    allow_live: bool = False
    since: str = "latest"
    tracker: str = ""
    max_age: float = 24 * 3600.0
    """Seconds after which it ends by itself."""
    job: tuple[job.Process, ...] = ()
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    """What tells it from another for the same directory."""

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Return the request that another process of ours wrote."""
        fields = json.loads(text)
        pairs = {name: tuple(tuple(pair) for pair in fields[name]) for name in ("volumes", "job")}
        return cls(**fields | pairs | {"groups": tuple(fields["groups"])})

    @property
    def note(self) -> Note:
        """What is to be known of it."""
        groups = tuple((str(each["name"]), str(each["root"])) for each in self.groups)
        return Note(self.at, (*self.volumes, *groups), self.job)


def usual_directory() -> str:
    """Return the directory that exports are shown at unless somebody says otherwise, made if it is not there."""
    path = state_directory() / "export"
    with contextlib.suppress(FileExistsError):  # a dead mount there cannot be looked at
        path.mkdir(mode=0o700)
    return os.path.realpath(path)


def start(manager: pluggy.PluginManager, request: Request) -> dict[str, Any]:
    """Export, in a process of its own, once the last export there is over; return its status when files are there.

    Raise NotNowError if another job still reads what is there, TargetError if the directory cannot be used.
    """
    for earlier in load_all():
        left_behind = (
            bool(earlier.job) and not job.alive(earlier.job) and bool({*earlier.names} & {*request.note.names})
        )
        if earlier.at == request.at or left_behind:
            _take_over(manager, earlier)
    fuse.unmount_from(Path(request.at))
    _check_directory(request.at)
    service.make_runtime_directory(KIND)
    told = json.dumps(dataclasses.asdict(request)).encode() + b"\n"
    command = ["-m", "blockferry.export.daemon"]
    said = service.start(command, request.note.socket, name=request.at, told=told, credentials=False)
    if said["id"] != request.id:
        raise taken(request.at)
    return said


def release(manager: pluggy.PluginManager, note: Note, *, force: bool, failed: bool = False) -> dict[str, Any]:
    """End an export, whatever became of its process; return what that said last, with all that went wrong.

    Plugins learn of it, and whether the job said that it `failed`.

    Raise BlockferryError if it belongs to a job that still runs and that we are no part of, but for `force`. That is a
    failure: whoever releases it thought that it was its own.
    """
    if not force and job.alive(note.job) and not job.is_ours(note.job):
        processes = ", ".join(str(number) for number, _began in note.job)
        raise BlockferryError(
            f"{note.at}: belongs to another job, which still runs (process {processes})",
            remedy="Wait for it, or take its files away all the same: blockferry release --force",
        )
    said: dict[str, Any] = {"at": note.at, "volumes": [{"name": name} for name in note.names], "failure": note.ended}
    try:
        said |= service.ask(note.socket, {"do": "release"}, name=note.at)[0]
        service.wait_until_free(note.socket)
    except service.NobodyThereError:
        said["failure"] = note.ended or _KILLED
    _clear_away(manager, note)
    tell(manager.hook.blockferry_export_released, statistics=said, failed=failed)
    return said


def standing() -> list[dict[str, Any]]:
    """Return what is known of every export that was not released."""
    found = []
    for each in load_all():
        said: dict[str, Any] = {"at": each.at, "volumes": [{"name": name} for name in each.names]}
        try:
            said |= service.ask(each.socket, {"do": "status"}, name=each.at)[0]
            state = "exported"
        except BlockferryError:
            state = f"broken off: {each.ended}" if each.ended else "broken off"
        found.append(said | {"state": state})
    return found


def _take_over(manager: pluggy.PluginManager, note: Note) -> None:
    """End an earlier export that nobody reads any more; raise NotNowError if somebody does.

    Also what is left of one whose process was killed is left alone while its job runs: that must not read on from ours.
    """
    if job.alive(note.job) and not job.is_ours(note.job):
        raise taken(note.at)
    try:
        service.ask(note.socket, {"do": "status"}, name=note.at)
    except service.NobodyThereError:
        _clear_away(manager, note)
        return
    # Not by force: that fails if anybody has a file or a directory of it open.
    if not fuse.unmounted(Path(note.at)):
        raise taken(note.at)
    service.wait_until_free(note.socket)
    _clear_away(manager, note)


def _clear_away(manager: pluggy.PluginManager, note: Note) -> None:
    """Take away whatever is left of an export whose process has ended."""
    service.make_runtime_directory(KIND)
    with _ended(note):
        fuse.unmount_from(Path(note.at))
        for _name, path in note.volumes:
            manager.hook.blockferry_thaw(path=path)
        note.socket.unlink(missing_ok=True)
        note.forget()


@contextlib.contextmanager
def _ended(note: Note) -> Iterator[None]:
    """Keep the process of an export from beginning; raise NotNowError if one runs, and is not about to end."""
    deadline = time.monotonic() + _PATIENCE
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(service.only_one(note.socket, taken(note.at)))
                break
            except NotNowError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def _check_directory(at: str) -> None:
    """Make the directory if it is not there; raise TargetError unless it is an empty one."""
    path = Path(at)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_mount() or any(path.iterdir()):
            what = "something is mounted there" if path.is_mount() else "is not empty"
            raise TargetError(f"{at}: {what}", remedy="Name a directory that is used for nothing else: --at DIR.")
    except OSError as error:
        raise TargetError(
            f"{at}: cannot be used: {error.strerror}", remedy="Name a directory that you may write: --at DIR."
        ) from None


def taken(at: str) -> NotNowError:
    """Return the error for a directory at which another export is in use."""
    return NotNowError(
        f"{at}: another job's export is there",
        remedy="Wait for that job, give this one a directory of its own (--at), or: blockferry release --force",
    )
