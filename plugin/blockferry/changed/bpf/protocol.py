"""How the plugin and the commands talk to the process that tracks a device: a private Unix socket, a question each.

The question is a line of JSON, `{"do": "checkpoint" | "changed" | "release" | "status" | "stop", ...}`; the answer is
one, too, with the length of the `payload` that follows it: extents, as starts and then ends, 64-bit little-endian. An
answer with `declined` says in words for the user why it is none.

The socket lies in a directory of its owner's alone, below /run: what cannot survive a reboot is not there after one.
It is named by the device's numbers. Who finds the socket there and nobody behind it knows that tracking broke off.
"""

from __future__ import annotations

import io
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np

from blockferry.changed.bpf.device import Numbers
from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet

_PATIENCE = 600.0
"""Seconds for an answer: several times what starting bpftrace and reading a full map ever take."""
_LONGEST_LINE = 1 << 16


class NotTrackedError(BlockferryError):
    """Nobody tracks the device. `broken_off`: somebody did, and did not end as asked."""

    def __init__(self, message: str, *, broken_off: bool = False) -> None:
        super().__init__(message, remedy="Start it: blockferry track start VOLUME")
        self.broken_off = broken_off


class DeclinedError(BlockferryError):
    """The process that tracks a device cannot answer; the message says why."""


def runtime_directory() -> Path:
    """Return the directory of the sockets, which may not be there."""
    return Path(os.environ.get("BLOCKFERRY_RUNTIME_DIR") or "/run/blockferry") / "track"


def make_runtime_directory() -> None:
    """Make the directory of the sockets if it is not there; raise BlockferryError if others could enter it."""
    path = runtime_directory()
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


def socket_path(numbers: Numbers) -> Path:
    """Return where the process that tracks a device listens."""
    return runtime_directory() / f"{numbers[0]}-{numbers[1]}.socket"


def tracked() -> list[Numbers]:
    """Return the devices for which there is a socket."""
    found = (path.stem.split("-") for path in runtime_directory().glob("*.socket"))
    return sorted((int(major), int(minor)) for major, minor in found)


def ask(numbers: Numbers, question: dict[str, Any]) -> tuple[dict[str, Any], ExtentSet]:
    """Ask the process that tracks a device; return its answer, and the extents that came with it.

    Raise NotTrackedError if there is none, DeclinedError with its reason if it cannot answer.
    """
    name = f"device {numbers[0]}:{numbers[1]}"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(os.fspath(socket_path(numbers)))
        except FileNotFoundError:
            raise NotTrackedError(f"{name}: is not tracked") from None
        except ConnectionRefusedError:
            raise NotTrackedError(f"{name}: what tracked it was killed", broken_off=True) from None
        except OSError as error:
            raise DeclinedError(f"{name}: what tracks it cannot be asked: {error}") from None
        if not peer_is_us(connection):
            raise DeclinedError(f"{name}: what tracks it is not root's")
        try:
            with connection.makefile("rwb") as stream:
                write_line(stream, question)
                answer = read_line(stream)
                extents = _read_extents(stream, int(answer.get("payload", 0)))
        except (OSError, ValueError) as error:
            raise DeclinedError(f"{name}: what tracks it does not answer: {error}") from None
    if "declined" in answer:
        raise DeclinedError(str(answer["declined"]), remedy=str(answer.get("remedy", "")))
    return answer, extents


def write_line(stream: io.BufferedRWPair, message: dict[str, Any], extents: ExtentSet | None = None) -> None:
    """Write a question or an answer, and the extents that belong to it."""
    payload = b"" if extents is None else _bytes_of(extents)
    stream.write(json.dumps(message | ({"payload": len(payload)} if payload else {})).encode() + b"\n" + payload)
    stream.flush()


def read_line(stream: io.BufferedRWPair) -> dict[str, Any]:
    """Return a question or an answer; raise ValueError if that is not what comes."""
    line = stream.readline(_LONGEST_LINE)
    message = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(message, dict):
        raise ValueError("the connection was closed")
    return message


def peer_is_us(connection: socket.socket) -> bool:
    """Tell whether the other end is root or ourselves (unix(7), SO_PEERCRED)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (0, os.geteuid())


def _bytes_of(extents: ExtentSet) -> bytes:
    return np.concatenate([extents.starts, extents.ends]).astype("<i8").tobytes()


def _read_extents(stream: io.BufferedRWPair, length: int) -> ExtentSet:
    data = stream.read(length)
    if len(data) != length or length % 16:
        raise ValueError("the connection was closed")
    offsets = np.frombuffer(data, "<i8").astype(np.int64)
    return ExtentSet.from_ranges(offsets[: offsets.size // 2], offsets[offsets.size // 2 :])
