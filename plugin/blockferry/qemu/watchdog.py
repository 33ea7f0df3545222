"""The process that takes away from a machine what a backup added, whatever becomes of the backup; `freeze` starts it.

    python -m blockferry.qemu.watchdog SOCKET SCRATCH SPARED

It does so when standard input closes or when the process that started it ends, and then removes the directory SCRATCH.
It also does so, and ends with exit code 3, when less than SPARED bytes are left where the overlay lies: if the overlay
cannot grow, QEMU fails the guest's own writes rather than the backup.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from blockferry.errors import NotNowError
from blockferry.qemu.fleecing import Scratch, end, free_bytes

NO_ROOM = 3

_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 120.0
"""For how long somebody else may keep the monitor from us."""


def main(arguments: Sequence[str]) -> int:
    """Wait, then clean up; return the exit code."""
    socket, place, spared = arguments[0], Scratch(Path(arguments[1])), int(arguments[2])
    parent = os.pidfd_open(os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    code = _wait(parent, place, spared)
    _insist(socket)
    if code != NO_ROOM:  # else it is still being read
        place.remove()
    return code


def _wait(parent: int, place: Scratch, spared: int) -> int:
    while not select.select([0, parent], [], [], _LOOK_SECONDS)[0]:
        if free_bytes(place) < spared:
            return NO_ROOM
    return 0


def _insist(socket: str) -> None:
    """Clean up in the machine, also if its monitor is busy for a while."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(NotNowError):
            end(socket)
            return
    end(socket)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
