"""Processes of ours that stay, and are asked over a private Unix socket: one tracks a device, one keeps a hot restore.

A question is a line of JSON, an answer one too, with the length of the `payload` of bytes that follows it. An answer
with `declined` says in words for the user why it is none.

The sockets lie in directories of their owner's alone, below /run: what cannot survive a reboot is not there after one.
Who finds a socket there and nobody behind it knows that the process broke off.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from blockferry import errors
from blockferry.errors import BlockferryError, NotNowError
from blockferry.programs import KEEP_FREED_MEMORY, NO_ALGEBRA

Answer = tuple[dict[str, Any], bytes]
"""What is said, and the bytes that go with it."""

_PATIENCE = 600.0
"""Seconds for an answer: several times what reading a tracker's full map, or writing out a disk, ever takes."""
_PATIENCE_TO_ASK = 10.0
"""Seconds for a question to come, once somebody has connected."""
_PATIENCE_TO_START = 180.0
_LONGEST_LINE = 1 << 20
_LONGEST_ADDRESS = 107
_SYSTEMDS = ("NOTIFY_SOCKET", "JOURNAL_STREAM", "WATCHDOG_USEC", "WATCHDOG_PID")
_OF_REPOSITORIES = re.compile(r"(BORG|RESTIC|RCLONE|AWS|AZURE|B2|GOOGLE|OS|ST)_.*|.*(PASS|SECRET|TOKEN|CREDENTIAL).*")
"""Variables by which borg, restic and what they store to are let in, and what looks like one of their kind."""
"""What systemd says to the process that it started, and not to one that outlives it."""


class NobodyThereError(BlockferryError):
    """No process listens there. `broken_off`: one did, and did not end as asked."""

    def __init__(self, message: str, *, remedy: str = "", broken_off: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.broken_off = broken_off


class DeclinedError(BlockferryError):
    """The process cannot answer; the message says why."""


def runtime_directory(kind: str) -> Path:
    """Return the directory of the sockets of one kind of processes, which may not be there."""
    return Path(os.environ.get("BLOCKFERRY_RUNTIME_DIR") or "/run/blockferry") / kind


def make_runtime_directory(kind: str) -> Path:
    """Return the same, made if it is not there; raise BlockferryError if others could enter it."""
    path = runtime_directory(kind)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
    except OSError as error:
        raise BlockferryError(
            f"{path}: the runtime directory cannot be made: {error.strerror}",
            remedy="Run as root, or set BLOCKFERRY_RUNTIME_DIR to a directory that you may write.",
        ) from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise BlockferryError(
            f"{path}: is open to others, or another's", remedy=f"Remove it, or: chown root {path}; chmod 700 {path}"
        )
    return path


@contextlib.contextmanager
def _address(place: Path) -> Iterator[str]:
    """Give a name for a socket that the kernel takes, wherever that is: it takes no more than 107 bytes (unix(7))."""
    if len(os.fsencode(place)) <= _LONGEST_ADDRESS:
        yield os.fspath(place)
        return
    directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{place.name}"
    finally:
        os.close(directory)


# -- who asks ----------------------------------------------------------------------------------------------------------


def ask(place: Path, question: dict[str, Any], *, name: str) -> Answer:
    """Ask the process that listens at `place`, which people know as `name`.

    Raise NobodyThereError if there is none, DeclinedError with its reason if it cannot answer.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE)
        try:
            with _address(place) as address:
                connection.connect(address)
        except FileNotFoundError:
            raise NobodyThereError(f"{name}: nothing runs for it") from None
        except ConnectionRefusedError:
            raise NobodyThereError(f"{name}: what ran for it was killed", broken_off=True) from None
        except OSError as error:
            raise DeclinedError(f"{name}: what runs for it cannot be asked: {error}") from None
        if not _peer_is_us(connection):
            raise DeclinedError(f"{name}: what runs for it is not root's")
        try:
            with connection.makefile("rwb") as stream:
                _write(stream, question, b"")
                answer = _read_line(stream)
                payload = _read_payload(stream, int(answer.get("payload", 0)))
        except ConnectionResetError:
            raise NobodyThereError(f"{name}: what ran for it has just ended") from None
        except (OSError, ValueError) as error:
            raise DeclinedError(f"{name}: what runs for it does not answer: {error}") from None
    if "declined" in answer:
        raise DeclinedError(str(answer["declined"]), remedy=str(answer.get("remedy", "")))
    return answer, payload


def start(command: list[str], place: Path, *, name: str, told: bytes = b"", credentials: bool = True) -> dict[str, Any]:
    """Start a process of its own by `command`; return its status as soon as it listens at `place`, or if one did.

    `told`, of at most a page, is on its standard input: what is secret does not go on a command line. Without
    `credentials` its environment has none: a job's hook is given the job's, and what it leaves running needs no
    repository.

    Raise BlockferryError, with what that process said last, if it does not come to that.
    """
    with contextlib.suppress(NobodyThereError):
        return ask(place, {"do": "status"}, name=name)[0]
    words_of = place.with_suffix(".log")
    reading, writing = os.pipe()
    with words_of.open("wb") as words, open(reading, "rb") as told_there:
        with open(writing, "wb") as telling:
            telling.write(told)  # a pipe holds it all
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=told_there,
            stdout=words,
            stderr=words,
            env=_environment(credentials=credentials),
            start_new_session=True,
        )
    deadline = time.monotonic() + _PATIENCE_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(NobodyThereError):
            return ask(place, {"do": "status"}, name=name)[0]
        time.sleep(0.02)
    process.kill()
    last = words_of.read_text(errors="replace").strip().splitlines() or [f"{name}: it did not start"]
    try:
        said = json.loads(last[-1])
        kind: type[BlockferryError] = getattr(errors, str(said["kind"]), BlockferryError)
        error = kind(str(said["message"]), remedy=str(said["remedy"]))
        error.exit_code = int(said["exit_code"])
    except (ValueError, KeyError, TypeError):
        error = BlockferryError(last[-1])
    raise error


def _environment(*, credentials: bool) -> dict[str, str]:
    """Return the environment of a process that stays."""
    kept = {name: value for name, value in os.environ.items() if name not in _SYSTEMDS}
    if not credentials:
        kept = {name: value for name, value in kept.items() if not _OF_REPOSITORIES.fullmatch(name)}
    return NO_ALGEBRA | kept | KEEP_FREED_MEMORY


def wait_until_free(place: Path) -> None:
    """Wait until the process that had the right to listen at `place` has ended; FileNotFoundError if none ever had."""
    with place.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


# -- being told to end -------------------------------------------------------------------------------------------------


class StopError(BaseException):
    """Somebody asked us to end."""


_told_to_end = threading.Event()


def end_by_signals() -> None:
    """Make SIGTERM and SIGINT raise StopError in the main thread, once: another would interrupt putting things away."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def end_if_told() -> None:
    """Raise StopError if we were told to end: what a signal raises in the middle of a finalizer, Python drops."""
    if _told_to_end.is_set():
        raise StopError


def _end(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _told_to_end.set()
    notify_systemd("STOPPING=1")
    raise StopError


# -- who answers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_one(place: Path, taken: NotNowError) -> Iterator[None]:
    """Hold the right to listen at `place`, until we end or die; raise `taken` if somebody has it."""
    with place.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield


@contextlib.contextmanager
def listening(place: Path) -> Iterator[socket.socket]:
    """Listen; the socket goes away with us, unless we are killed."""
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        with _address(place) as address:
            listener.bind(address)
        try:
            listener.listen()
            yield listener
        finally:
            place.unlink(missing_ok=True)


def answer_next(listener: socket.socket, answer: Callable[[dict[str, Any]], Answer]) -> dict[str, Any]:
    """Answer whoever connects next and is us or root; return the question, empty if there was none.

    Whoever asked and went away, or asks nonsense, is no reason to end.
    """
    question: dict[str, Any] = {}
    connection, _address = listener.accept()
    with connection:
        connection.settimeout(_PATIENCE_TO_ASK)
        with contextlib.suppress(OSError, ValueError), connection.makefile("rwb") as stream:
            if _peer_is_us(connection):
                question = _read_line(stream)
                try:
                    said, payload = answer(question)
                except BlockferryError as error:
                    said, payload = {"declined": error.message, "remedy": error.remedy}, b""
                _write(stream, said, payload)
    return question


def notify_systemd(state: str) -> None:
    """Tell systemd of a state, such as READY=1 or STATUS=..., if it is systemd that started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, contextlib.suppress(OSError):
            systemd.settimeout(1.0)
            systemd.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def run_apart(serve: Callable[[], None]) -> int:
    """Be the process that `start` has started, away from any terminal; return the exit code.

    Why it ends is said on stderr as `start` reads it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        serve()
    except BlockferryError as error:
        kind = type(error).__name__
        told = {"kind": kind, "message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        print(json.dumps(told), file=sys.stderr)  # noqa: T201  # who started us shows it
        return error.exit_code
    return 0


# -- the line between them ---------------------------------------------------------------------------------------------


def _write(stream: io.BufferedRWPair, message: dict[str, Any], payload: bytes) -> None:
    """Write a question or an answer, and the bytes that belong to it."""
    stream.write(json.dumps(message | ({"payload": len(payload)} if payload else {})).encode() + b"\n" + payload)
    stream.flush()


def _read_line(stream: io.BufferedRWPair) -> dict[str, Any]:
    """Return a question or an answer; raise ValueError if that is not what comes."""
    line = stream.readline(_LONGEST_LINE)
    message = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(message, dict):
        raise ValueError("the connection was closed")
    return message


def _read_payload(stream: io.BufferedRWPair, length: int) -> bytes:
    payload = stream.read(length)
    if len(payload) != length:
        raise ValueError("the connection was closed")
    return payload


def _peer_is_us(connection: socket.socket) -> bool:
    """Tell whether the other end is root or ourselves (unix(7), SO_PEERCRED)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (0, os.geteuid())
