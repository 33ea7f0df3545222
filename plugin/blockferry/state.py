"""Where blockferry keeps what is local to this host: `BLOCKFERRY_STATE_DIR`, else /var/lib (root), else XDG's.

Nothing here is the truth: losing the directory costs time, never data.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from blockferry.errors import BlockferryError, NotNowError
from blockferry.qemu.name import DiskName
from blockferry.volume import Volume


def state_directory() -> Path:
    """Return the directory, made if it is not there, open to its owner alone."""
    named = os.environ.get("BLOCKFERRY_STATE_DIR")
    if named:
        path = Path(named)
    elif os.geteuid() == 0:
        path = Path("/var/lib/blockferry")
    else:
        path = platformdirs.user_state_path("blockferry")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BlockferryError(
            f"{path}: the state directory cannot be made: {error.strerror}",
            remedy="Set BLOCKFERRY_STATE_DIR to a directory that you may write.",
        ) from None
    return path


@contextlib.contextmanager
def exclusive(volume: Volume) -> Iterator[None]:
    """Hold the lock of a volume; raise NotNowError if another backup of it runs on this host.

    The lock is on the device or inode, not on the path, and the kernel lets go of it when the process dies. A running
    machine has one for all of its disks.
    """
    machine = DiskName.parse(volume.path)
    facts = os.stat(machine.socket if machine else volume.path)
    key = f"device-{facts.st_rdev}" if volume.is_device else f"file-{facts.st_dev}-{facts.st_ino}"
    with locked(key, f"{volume.path}: another backup of this volume is running"):
        yield


@contextlib.contextmanager
def locked(key: str, refusal: str) -> Iterator[None]:
    """Hold a lock of this host's; raise NotNowError, with those words, if another process has it."""
    directory = state_directory() / "locks"
    directory.mkdir(mode=0o700, exist_ok=True)
    with (directory / f"{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotNowError(refusal, remedy="Wait for it, then try again.") from None
        yield
