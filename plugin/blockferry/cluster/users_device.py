"""The device that a host's users have of a shared volume: the guard is in its path only while a backup runs.

    direct     user -> device-mapper -> the volume
    guarded    user -> device-mapper -> loop device -> FUSE file -> guard -> the volume

`mapper.py` says how one way is exchanged for the other. The filesystem is not frozen for that: OCFS2 cannot be.

No write passes an epoch by. A member has the way exchanged before it reports `ready`, and by then every write of the
direct way has ended. The instant comes after all hosts have reported that, and more: those writes are of before it,
and every later one comes to the guard, which holds or logs it. The way back is taken once this host has stopped
logging: because everything is copied, or because the epoch is void and that is what this host is going to report.

Neither way shows what is older than by the other. A request of device-mapper passes the page caches of the volume and
of the loop device by, the loop device that of the FUSE file (direct I/O; a loop device without it stays in the path),
the guard that of the volume. What either way acknowledged is on the volume, or in the volume's own cache, which a flush
by either way empties. What a guard acknowledges before that (`--buffer`) is no matter of backups: it stays in the path.
Pages that a filesystem or a reader of the device itself keeps lie before both ways.

    the guard was killed   its users                              until the next guard of that name
    while direct           go on, and nobody sees what they do    no backup begins: the index knows of the device
    while guarded          have errors, as of an unplugged disk   that one leads the device to the volume at first

A guard that finds such a device takes it over, and no part in an epoch that is open already.

Not every volume has such a device: image files, disks with partitions, which device-mapper does not show, and hosts
without device-mapper do not. Their users have the loop device, and are guarded all the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from blockferry import mapper
from blockferry.errors import BlockferryError, UsageError
from blockferry.inuse import numbers_of, users_of
from blockferry.volume import Volume, probe

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds for which users may wait when the guard comes into the path, or leaves it."""
_UUID = "blockferry-guard-"


def mapper_name(name: str) -> str:
    """Return what the device is called; hosts that are played on one machine have runtime directories of their own."""
    directory = os.environ.get("BLOCKFERRY_RUNTIME_DIR", "")
    return f"blockferry-guard-{name}" + (f"-{_digest(directory)}" if directory else "")


class UsersDevice:
    """A device that leads to the guard, and nowhere else."""

    lasts = False
    """Whether its users can go on when the guard is killed."""
    gone = True
    """Whether they can no more, now that the guard ends."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.guarded = True
        self.failure = ""
        """Why the guard is in the path although nothing needs it."""

    def users(self) -> list[str]:
        """Return who uses it, a phrase each."""
        return users_of(self.path)

    def guard(self) -> None:
        """Lead to the guard; raise BlockferryError if it cannot be."""

    def pass_by(self) -> None:
        """Lead past the guard; what prevents that is in `failure`, and tried again after the next `guard`."""


class SwitchedDevice(UsersDevice):
    """One that leads to the guard or to the volume."""

    lasts = True
    gone = False

    def __init__(self, name: str, volume: Volume, loop: str, *, guarded: bool) -> None:
        super().__init__(os.fspath(mapper.path_of(name)))
        self.guarded = guarded
        self._name, self._volume, self._loop = name, volume, loop

    def guard(self) -> None:
        """Return when every write that the guard does not see has ended."""
        self.failure = ""
        if not self.guarded:
            self.guarded = True  # where it fails, too: whether it came to that is not known, and `pass_by` settles it
            self._lead_to(self._loop)

    def pass_by(self) -> None:
        """Return when nobody needs the guard any more, or `failure` says why."""
        if not self.guarded or self.failure:
            return
        try:
            self._lead_to(self._volume.path)
        except BlockferryError as error:
            self.failure = f"the guard stays in the path: {error.message}"
            log.error("%s: %s", self.path, self.failure)
        else:
            self.guarded = False

    def remove(self) -> None:
        """Take the device away, as soon as nobody uses it."""
        if not self.users():
            with contextlib.suppress(BlockferryError):  # a process has it open
                mapper.remove(self._name)
        mapper.remove_when_unused(self._name)
        self.gone = not mapper.path_of(self._name).exists()

    def _lead_to(self, below: str) -> None:
        began = time.monotonic()
        with mapper.exchanging(self._name, self._volume.size, below, freeze=False, seconds=_PATIENCE):
            loaded = time.monotonic()
        log.info(
            "%s: leads to %s; loaded in %.3f s, users waited for %.3f s at most",
            *(self.path, below, loaded - began, time.monotonic() - loaded),
        )


def take_over(name: str, volume: Volume, *, buffered: bool) -> bool:
    """Lead the device that an earlier guard left, if there is one, to the volume; return whether there is.

    Raise BlockferryError if somebody uses it and it cannot be taken over: it is of another volume, or has to be guarded
    all the time.
    """
    called = mapper_name(name)
    found = mapper.look(called) if mapper.is_there() else None
    if found is None:
        return False
    if not _can_be_switched(volume, buffered) or (found.uuid, found.size) != (_uuid(name, volume), volume.size):
        remove_left_over(name, force=False)
        return True
    mapper.keep(called)
    if found.below != numbers_of(volume.path):
        log.info("%s: leads to %s again", called, volume.path)
        with mapper.exchanging(called, volume.size, volume.path, freeze=False):
            pass
    return True


def remove_left_over(name: str, *, force: bool) -> bool:
    """Take away the device that a guard left that was killed; return whether there was one.

    Raise UsageError if it is in use, and no `force`: then it goes as soon as it is not any more.
    """
    called = mapper_name(name)
    found = mapper.look(called) if mapper.is_there() else None
    if found is None:
        return False
    if not found.uuid.startswith(_UUID):
        raise UsageError(f"/dev/mapper/{called}: is not a guard's", remedy="Give this guard another --name.")
    if force:
        mapper.remove_when_unused(called)
        return True
    if users := users_of(os.fspath(mapper.path_of(called))):
        raise UsageError(f"{name}: in use: {'; '.join(users)}", remedy="Unmount it, or use --force.")
    mapper.remove(called)
    return True


@contextlib.contextmanager
def shown(name: str, volume: Volume, loop: str, *, buffered: bool) -> Iterator[UsersDevice]:
    """Give what users are to use of a volume that `loop` guards: guarded, unless it was taken over.

    Raise BlockferryError if device-mapper fails.
    """
    if not _can_be_switched(volume, buffered) or not _is_direct(loop):
        remove_left_over(name, force=False)
        yield UsersDevice(loop)
        return
    called = mapper_name(name)
    taken_over = mapper.look(called) is not None
    if not taken_over:
        mapper.create(called, volume.size, loop, uuid=_uuid(name, volume))
    device = SwitchedDevice(called, volume, loop, guarded=not taken_over)
    try:
        yield device
    finally:
        device.remove()


def _can_be_switched(volume: Volume, buffered: bool) -> bool:
    if buffered or not volume.is_device or volume.size % mapper.SECTOR or not mapper.is_there():
        return False
    return bool(volume.filesystem) or "PTTYPE" not in probe(volume.path)


def _is_direct(loop: str) -> bool:
    """Tell whether a loop device passes its file's page cache by."""
    return Path("/sys/block", Path(loop).name, "loop/dio").read_text().strip() == "1"


def _uuid(name: str, volume: Volume) -> str:
    """Return what tells a device of this volume from one of another that had its name."""
    return _UUID + _digest(f"{mapper_name(name)} {os.path.realpath(volume.path)}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
