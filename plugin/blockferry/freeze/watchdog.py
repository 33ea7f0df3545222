"""The process that freezes filesystems and thaws them whatever happens; a script of its own, `suspension` starts it.

    watchdog.py SECONDS DESCRIPTOR...

It freezes (FIFREEZE, linux/fs.h) the filesystem behind each inherited descriptor, answers `frozen` on standard
output, and then `frozen` or `thawed` to every line on standard input. It thaws and ends when standard input closes,
when the process that started it ends, or when the time is over; then, and only then, its last word is `expired`.
Failing to freeze it thaws what it froze and answers `failed INDEX ERRNO`.

Nothing here may touch a disk once something is frozen: all imports come first, and only the standard library is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


def thaw(descriptors: Sequence[int]) -> None:
    """Thaw the filesystem behind each descriptor; one that is not frozen is none of our business."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, FITHAW, 0)


def main(arguments: Sequence[str]) -> None:
    """Freeze, wait, thaw."""
    seconds, descriptors = float(arguments[0]), [int(each) for each in arguments[1:]]
    parent = os.pidfd_open(os.getppid())
    _outlive_the_parent()
    frozen: list[int] = []
    try:
        for index, descriptor in enumerate(descriptors):
            try:
                fcntl.ioctl(descriptor, FIFREEZE, 0)
            except OSError as error:
                _say(f"failed {index} {error.errno}")
                return
            frozen.append(descriptor)
        deadline = time.monotonic() + seconds
        _say("frozen")
        expired = _wait(deadline, parent, frozen)
    finally:
        thaw(frozen[::-1])
    if expired:
        _say("expired")


def _wait(deadline: float, parent: int, frozen: Sequence[int]) -> bool:
    """Answer questions until it is time to thaw; return whether that is because the time is over."""
    events = select.poll()
    events.register(0, select.POLLIN)
    events.register(parent, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        ready = [number for number, _event in events.poll(left * 1000)]
        if parent in ready or (0 in ready and not os.read(0, 64)):
            return False
        if ready:
            _say("frozen" if all(_still_frozen(each) for each in frozen) else "thawed")
    return True


def _still_frozen(descriptor: int) -> bool:
    """Tell whether nobody else thawed a filesystem, by freezing it again: what is frozen refuses that."""
    try:
        fcntl.ioctl(descriptor, FIFREEZE, 0)
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _outlive_the_parent() -> None:
    """Ignore what stops the parent, and be the last that the kernel kills for want of memory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(score, b"-1000")


def _say(word: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{word}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
