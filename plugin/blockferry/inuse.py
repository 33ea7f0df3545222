"""Who uses a volume: an exclusive claim on its devices, or the names of those who stand in the way.

The kernel gives a block device to one holder at a time (open(2), O_EXCL on block devices): a mount, a swap area, an
md or dm device on it, or us. What does not ask for that right, such as a virtual machine on a raw device, is found by
its open descriptors (proc_pid_fd(5)), and what comes later by the device's count of written sectors
(Documentation/admin-guide/iostats of the kernel).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blockferry.errors import VolumeError
from blockferry.volume import Mount, all_mounts, loops_of

Numbers = tuple[int, int]
"""(major, minor) of a block device."""

_FLUSH_SECONDS = 1.0
"""How often a claim pushes out what somebody wrote to a claimed device and the device does not know of yet."""


_MOMENT = 0.5
"""Seconds after which whoever has a device open to write is not just looking at it."""


class InUseError(VolumeError):
    """A volume, or a device on it, is in use; `users` says by whom, a phrase each."""

    def __init__(self, path: str, users: list[str]) -> None:
        super().__init__(f"{path}: in use: {'; '.join(users)}", remedy="Unmount it, or stop what uses it.")
        self.users = users


@dataclasses.dataclass
class Claim:
    """The devices of a volume, held exclusively, and how much had been written to each when they began to count."""

    path: str
    harmless: Callable[[Mount], bool]
    access: int
    """os.O_RDONLY or os.O_RDWR."""
    descriptors: dict[Numbers, int]
    """One a device, opened exclusively, unless a harmless mount has it."""
    mounts: list[Mount]
    """The harmless mounts."""
    written: dict[Numbers, int] = dataclasses.field(default_factory=dict)
    flushed: float = 0.0

    def begin(self) -> None:
        """Push out what is dirty; what is written from now on is an error."""
        self._flush()
        self.written = {device: _sectors_written(device) for device in self.descriptors}

    def check(self) -> None:
        """Raise VolumeError if a device was written to since `begin`, or vanished."""
        try:
            if time.monotonic() - self.flushed > _FLUSH_SECONDS:
                self._flush()
            changed = [device for device, before in self.written.items() if _sectors_written(device) != before]
        except OSError as error:
            raise VolumeError(
                f"{self.path}: {error.strerror}", remedy="The device vanished or fails: look at the kernel log."
            ) from None
        for device in changed:
            users = [f"mounted read-write at {each.point}" for each in self._harmful()]
            users += writers({device})[0]
            by = f" ({'; '.join(users)})" if users else ""
            raise VolumeError(
                f"{self.path}: somebody wrote to {device_name(device)} during the backup{by}",
                remedy="Stop what writes to it and run the backup again.",
            )

    def _harmful(self) -> list[Mount]:
        return [each for each in all_mounts() if each.device in self.descriptors and not self.harmless(each)]

    def _flush(self) -> None:
        for descriptor in self.descriptors.values():
            os.fsync(descriptor)
        self.flushed = time.monotonic()


@contextlib.contextmanager
def claim(path: str, harmless: Callable[[Mount], bool], access: int = os.O_RDONLY) -> Iterator[Claim]:
    """Hold every device that shows a device or image file, so that nobody mounts or otherwise takes it meanwhile.

    Who wants to write to a device asks for `access` os.O_RDWR and writes by way of the claim's own descriptor: while
    a device is held, the kernel punches holes in it and reads its partition table again for its holder alone.

    Raise InUseError, naming all users, if one is mounted other than `harmless` allows, held, or open for writing
    anywhere; and if that cannot be known, because only root sees every process.
    """
    devices = _devices_of(path)
    family = {relative for device in devices for relative in (device, *_partitions(device), *_parent(device))}
    processes, all_seen = _lasting_writers(family, path)  # before we have them open ourselves
    with contextlib.ExitStack() as opened:
        taken = Claim(path, harmless, access, {}, [])
        users = [user for device in devices for user in _take(device, taken, opened)] + processes
        if not users and not all_seen:
            users.append("only root can see whether another process writes to it")
        if users:
            raise InUseError(path, users)
        taken.begin()
        yield taken


def _lasting_writers(devices: set[Numbers], path: str) -> tuple[list[str], bool]:
    """Return what `writers` does, but for who lets go at once: whoever sets up a loop device opens others as well."""
    deadline = time.monotonic() + _MOMENT
    while True:
        found = writers(devices, path)
        if not found[0] or time.monotonic() > deadline:
            return found
        time.sleep(_MOMENT / 5)


def writers(devices: set[Numbers], path: str = "") -> tuple[list[str], bool]:
    """Return the processes that have a device, or the file at a path, open for writing; and whether all were asked."""
    image = _file_number(os.stat(path)) if path else None
    found, all_seen = set(), os.geteuid() == 0  # hidepid hides other users' processes without a trace
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((process / "fd").iterdir())
        except PermissionError:
            all_seen = False
            continue
        except OSError:
            continue  # it has ended
        for descriptor in descriptors:
            with contextlib.suppress(OSError, StopIteration, ValueError):
                if not _open_for_writing(process, descriptor):
                    continue
                facts = descriptor.stat()
                is_device = stat.S_ISBLK(facts.st_mode)
                if _device_number(facts) in devices if is_device else _file_number(facts) == image:
                    name = (process / "comm").read_text(errors="replace").strip()
                    found.add(f"process {process.name} ({name}) has it open for writing")
    return sorted(found), all_seen


def users_of(path: str) -> list[str]:
    """Return what has the block device at a path; a phrase each."""
    return holders_and_mounts(numbers_of(path))


def numbers_of(path: str) -> Numbers:
    """Return the numbers of the block device at a path."""
    return _device_number(os.stat(path))


def holders_and_mounts(device: Numbers) -> list[str]:
    """Return what has a device, or a partition of it: mounts, swap, devices on top of it; a phrase each."""
    found = []
    for part in (device, *_partitions(device)):
        mounts = [mount for mount in all_mounts() if mount.device == part]
        found += [f"{device_name(part)} is mounted at {mount.point}" for mount in mounts]
        found += _holders(part)
    return found


def device_name(device: Numbers) -> str:
    """Return the path of a block device, by the kernel's own name for it."""
    try:
        lines = (_sysfs(device) / "uevent").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")]
    return f"/dev/{names[0]}" if names else f"device {device[0]}:{device[1]}"


def _devices_of(path: str) -> list[Numbers]:
    """Return every device that shows a device or image file, or a window of it; partitions are left to `_take`."""
    facts = os.stat(path)
    own = [_device_number(facts)] if stat.S_ISBLK(facts.st_mode) else []
    return own + [loop.device for loop in loops_of(path)]


def _take(device: Numbers, taken: Claim, opened: contextlib.ExitStack) -> list[str]:
    """Open a device exclusively, or what of it is not harmlessly mounted; return who else has it."""
    try:
        descriptor = os.open(device_name(device), taken.access | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            return [f"{device_name(device)} cannot be opened ({error.strerror})"]
        return _take_parts(device, taken, opened)
    opened.callback(os.close, descriptor)
    taken.descriptors[device] = descriptor
    return []


def _take_parts(device: Numbers, taken: Claim, opened: contextlib.ExitStack) -> list[str]:
    """Take a device that somebody has: it is harmlessly mounted, or its partitions are; return who else has it."""
    mounts = [mount for mount in all_mounts() if mount.device == device]
    harmful = [mount for mount in mounts if not taken.harmless(mount)]
    if harmful:
        modes = {True: "read-only", False: "read-write"}
        return [f"{device_name(device)} is mounted {modes[mount.read_only]} at {mount.point}" for mount in harmful]
    if not mounts:
        # A disk is taken as soon as one of its partitions is: each of them has to be free or harmlessly mounted,
        # and one of those mounts has to be why.
        before = len(taken.mounts)
        users = [user for part in _partitions(device) for user in _take(part, taken, opened)]
        if users or len(taken.mounts) == before:
            unknown = f"{device_name(device)} is held by a process, or mounted in another namespace"
            return users or _holders(device) or [unknown]
    descriptor = os.open(device_name(device), taken.access | os.O_CLOEXEC)
    opened.callback(os.close, descriptor)
    taken.descriptors[device] = descriptor
    taken.mounts += mounts
    return []


def _holders(device: Numbers) -> list[str]:
    """Return what has a device that is not mounted here, from /sys/class/block/NAME/holders and /proc/swaps."""
    name, found = device_name(device), []
    for holder in sorted((_sysfs(device) / "holders").glob("*")):
        friendly = holder / "dm" / "name"
        called = f" ({friendly.read_text().strip()})" if friendly.exists() else ""
        found.append(f"{name} is held by {holder.name}{called}")
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        with contextlib.suppress(OSError):
            if _device_number(os.stat(line.split()[0])) == device:
                found.append(f"{name} is swap space")
    return found


def _open_for_writing(process: Path, descriptor: Path) -> bool:
    """Tell whether a process may write through a descriptor that leads to a file or device (proc_pid_fdinfo(5))."""
    if not str(descriptor.readlink()).startswith("/"):
        return False  # a pipe, a socket
    lines = (process / "fdinfo" / descriptor.name).read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


def _sectors_written(device: Numbers) -> int:
    """Return how many sectors were ever written to a device: its count of writes counts flushes too.

    Discards are left out: a filesystem may still give back free blocks when it is frozen, and nobody else may.
    """
    with open(f"/sys/dev/block/{device[0]}:{device[1]}/stat", "rb", buffering=0) as file:  # at every read
        return int(file.read(512).split()[6])


def _partitions(device: Numbers) -> list[Numbers]:
    return [_read_numbers(entry.parent) for entry in sorted(_sysfs(device).glob("*/partition"))]


def _parent(device: Numbers) -> list[Numbers]:
    """Return the disk of a partition."""
    return [_read_numbers(_sysfs(device).resolve().parent)] if (_sysfs(device) / "partition").exists() else []


def _sysfs(device: Numbers) -> Path:
    return Path(f"/sys/dev/block/{device[0]}:{device[1]}")


def _read_numbers(entry: Path) -> Numbers:
    major, minor = (entry / "dev").read_text().split(":")
    return int(major), int(minor)


def _file_number(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _device_number(facts: os.stat_result) -> Numbers:
    """Return the number of the device that a device node leads to."""
    return os.major(facts.st_rdev), os.minor(facts.st_rdev)
