"""QEMU's monitor, spoken as JSON lines over a unix socket: docs/interop/qmp-spec of QEMU.

    server: {"QMP": {...}}                                 the greeting
    client: {"execute": COMMAND, "arguments": {...}}
    server: {"return": ...} or {"error": {"desc": ...}}    with {"event": ...} lines in between

A monitor serves one client at a time; the next waits for its greeting. So a connection is kept for a few commands only.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from blockferry.errors import NotNowError, VolumeError

_SECONDS = 60.0
"""For how long a monitor may be silent: it waits for the disk when a backup job begins."""

_GREETING_SECONDS = 10.0
"""For how long somebody else may keep the monitor."""


class QmpError(VolumeError):
    """The machine refused a command; the message ends with its own words."""


class GoneError(VolumeError):
    """Nobody answers at the socket: the machine does not run."""


class Monitor:
    """A connection to a machine's monitor. Used by one thread."""

    def __init__(self, path: str, connection: socket.socket) -> None:
        """Read the greeting and agree on what is spoken."""
        self.path = path
        self.connection = connection
        self.lines = connection.makefile("rb")
        connection.settimeout(_GREETING_SECONDS)
        try:
            if "QMP" not in self._receive():
                raise VolumeError(
                    f"{path}: not a QMP socket", remedy="Start QEMU with -qmp unix:PATH,server=on,wait=off."
                )
        except TimeoutError:
            raise NotNowError(
                f"{path}: somebody else uses this monitor, and it serves one at a time",
                remedy="Give blockferry a QMP socket of its own (a second -qmp unix:PATH,server=on,wait=off).",
            ) from None
        connection.settimeout(_SECONDS)
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command, `_` for `-` in the names of its arguments, and return its result; QmpError if it fails."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self.connection.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
            while "event" in (answer := self._receive()):
                pass
        except OSError as error:
            raise GoneError(f"{self.path}: {command}: {error}", remedy="Does the machine still run?") from None
        if "return" not in answer:
            reason = answer.get("error", {}).get("desc", "no reason given")
            raise QmpError(f"{self.path}: {command}: {reason}")
        return answer["return"]

    def peer(self) -> tuple[int, int]:
        """Return the user and group of the process that listens at the socket (SO_PEERCRED, unix(7))."""
        credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=3i"))
        _process, user, group = struct.unpack("=3i", credentials)
        return user, group

    def _receive(self) -> dict[str, Any]:
        line = self.lines.readline()
        if not line:
            raise ConnectionResetError("the connection was closed")
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        raise VolumeError(f"{self.path}: not a QMP socket", remedy="Start QEMU with -qmp unix:PATH,server=on,wait=off.")


@contextlib.contextmanager
def connected(path: str) -> Iterator[Monitor]:
    """Talk to the monitor at a socket.

    Raise GoneError if nobody listens there, NotNowError if somebody else talks to it.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(_GREETING_SECONDS)
        try:
            connection.connect(path)
            monitor = Monitor(path, connection)
        except OSError as error:
            raise GoneError(
                f"{path}: {error.strerror or error}", remedy="Does the machine run, with a QMP socket at that path?"
            ) from None
        with contextlib.closing(monitor.lines):
            yield monitor


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Ask again until it is so: QEMU ends exports and jobs after it has answered. VolumeError after a minute."""
    deadline = time.monotonic() + _SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise VolumeError(f"{what} has not ended after {_SECONDS:g} s", remedy="Is the machine stuck?")
        time.sleep(0.02)
