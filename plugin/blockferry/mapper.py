"""Linear devices of device-mapper: a device that leads to another one, and can be made to lead elsewhere while in use.

Its table is exchanged in one step of the kernel's (dm-ioctl, DM_DEV_SUSPEND without its flag: "resume"; a device that
is not suspended is suspended first): it holds new requests back, waits until those that are under way have ended, and
goes on with the other table. If that takes too long, and is broken off, it goes on with the table that it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from blockferry.errors import BlockferryError
from blockferry.inuse import Numbers
from blockferry.programs import find, look_for

SECTOR = 512
"""The unit of every length in a table: what is no multiple of it cannot be led to."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A device that is there, and leads all of it to one other."""

    uuid: str
    """What it was given when it was made, besides its name."""
    size: int
    below: Numbers


def is_there() -> bool:
    """Tell whether this kernel has device-mapper, and this machine the program that speaks to it."""
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return look_for("dmsetup") is not None


def path_of(name: str) -> Path:
    """Return where the device of a name is."""
    return Path("/dev/mapper") / name


def look(name: str) -> Linear | None:
    """Return what the device of a name is; None if there is none; raise BlockferryError if it is nothing linear."""
    if not path_of(name).exists():
        return None
    table = re.fullmatch(r"0 (\d+) linear (\d+):(\d+) 0 ?\n", _dmsetup("table", name))
    if not table:
        raise BlockferryError(
            f"{path_of(name)}: is none of ours", remedy=f"Give it another name: dmsetup rename {name} NEW"
        )
    uuid = _dmsetup("info", name, "--columns", "--noheadings", "--options", "uuid").strip()
    return Linear(uuid, int(table[1]) * SECTOR, (int(table[2]), int(table[3])))


def create(name: str, size: int, below: str, *, uuid: str = "") -> str:
    """Make a device that leads to another one; return its path."""
    _dmsetup("create", name, *(["--uuid", uuid] if uuid else []), "--table", _table(size, below))
    if not path_of(name).exists():
        _dmsetup("mknodes", name)  # where no udev runs
    return os.fspath(path_of(name))


@contextlib.contextmanager
def exchanging(name: str, size: int, below: str, *, freeze: bool, seconds: float | None = None) -> Iterator[None]:
    """Have a device lead to another one when the context ends; where it led before, if that fails or the context does.

    `freeze` the filesystem on it for that moment, if it can be. Requests wait, for so many `seconds` at most.
    """
    _dmsetup("load", name, "--table", _table(size, below))
    try:
        yield
        # Its nodes stay as they are: udev, which may be slow, need not be waited for.
        _dmsetup("resume", name, "--noudevsync", *([] if freeze else ["--nolockfs"]), seconds=seconds)
    except BaseException:
        _dmsetup("clear", name, check=False)
        raise


def remove(name: str) -> None:
    """Take a device away; raise BlockferryError if somebody uses it."""
    _dmsetup("remove", "--retry", name)  # udev may be looking at it


def remove_when_unused(name: str) -> None:
    """Take a device away as soon as nobody uses it."""
    _dmsetup("remove", "--deferred", name, check=False)


def keep(name: str) -> None:
    """Take back what `remove_when_unused` said, and what an exchange that was killed has left."""
    _dmsetup("message", name, "0", "@cancel_deferred_remove", check=False)
    _dmsetup("clear", name, check=False)


def _table(size: int, below: str) -> str:
    return f"0 {size // SECTOR} linear {below} 0"


def _dmsetup(*words: str, check: bool = True, seconds: float | None = None) -> str:
    try:
        done = subprocess.run(
            [find("dmsetup"), *words],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"LC_ALL": "C"},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BlockferryError(
            f"dmsetup {words[0]} took longer than {seconds:.1f} s", remedy="Look at the kernel log (dmesg)."
        ) from None
    if check and done.returncode:
        raise BlockferryError(
            f"dmsetup {words[0]} failed: {' '.join(done.stderr.split())}", remedy="Look at the kernel log (dmesg)."
        )
    return done.stdout
