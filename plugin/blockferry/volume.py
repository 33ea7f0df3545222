"""A volume: a block device or an image file, what is on it, and how to know it again.

What a volume holds is asked of `blkid` (util-linux), which probes the bytes, never a cache, and knows every signature
worth knowing. Where it is mounted comes from `/proc/self/mountinfo` (proc_pid_mountinfo(5)) and, for an image file,
from the loop devices that it backs (`/sys/block/loop*/loop/backing_file`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import VolumeError
from blockferry.layers import DirectLayer, FileLayer
from blockferry.programs import find
from blockferry.qemu.name import DiskName

_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272


@dataclasses.dataclass(frozen=True)
class Mount:
    """One place where a filesystem is mounted. `device` is (major, minor) of the device that it lies on."""

    point: str
    filesystem: str
    read_only: bool
    device: tuple[int, int]
    id: int
    """The mount's own number, by which an open file names it (/proc/PID/fdinfo)."""
    superblock: tuple[int, int]
    """What the kernel calls the mounted filesystem: the device, but for btrfs a number of its own."""
    options: frozenset[str] = frozenset()
    """The superblock's own options, as the kernel lists them."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """A block device or image file, or a window of one; sizes and offsets in bytes."""

    path: str
    name: str
    size: int
    block_size: int
    is_device: bool
    filesystem: str
    """The type that blkid names (`ext4`, `xfs`, `ntfs`, ...), "" if there is none that it knows."""
    identity: dict[str, str]
    """What tells this volume from others: `filesystem_uuid`, `partition_uuid`,
    `partition_table_uuid`, `serial`, `wwn`."""
    offset: int = 0
    """Where the window begins in `path`: not 0 for a partition inside an image."""

    @classmethod
    def discover(cls, path: str | os.PathLike[str], name: str = "") -> Volume:
        """Look at a path, or ask a machine for its disk (`qemu:SOCKET:NODE`).

        Raise VolumeError if it is neither that nor a block device nor a regular file that can be read.
        """
        given = os.fspath(path)
        if disk := DiskName.parse(given):
            from blockferry.qemu.disk import discover  # noqa: PLC0415  # it makes volumes itself

            return discover(disk, name)
        with contextlib.closing(_Descriptor(given)) as opened:
            mode = os.fstat(opened.number).st_mode
            if stat.S_ISBLK(mode):
                size = struct.unpack("=Q", fcntl.ioctl(opened.number, _BLKGETSIZE64, bytes(8)))[0]
                block_size = struct.unpack("=i", fcntl.ioctl(opened.number, _BLKSSZGET, bytes(4)))[0]
            elif stat.S_ISREG(mode):
                size, block_size = os.fstat(opened.number).st_size, 512
            else:
                raise VolumeError(
                    f"{given}: neither a block device nor an image file",
                    remedy="Name a device such as /dev/vg/root, a partition, or a disk image.",
                )
            if not size:
                raise VolumeError(f"{given}: has no bytes", remedy="Is the medium inserted, the image written?")
            facts = probe(given)
            device = os.fstat(opened.number).st_rdev if stat.S_ISBLK(mode) else None
        return cls(
            path=os.path.abspath(given),  # noqa: PTH100  # not resolved: what the user says stays recognizable
            name=name or default_name(given),
            size=size,
            block_size=block_size,
            is_device=device is not None,
            filesystem=facts.get("TYPE", ""),
            identity=_identity(facts, device),
        )

    def window(self, offset: int, size: int) -> Volume:
        """Return the part of this volume at `offset`, as a volume of its own, with what is on it."""
        facts = probe(self.path, offset=self.offset + offset, size=size)
        return dataclasses.replace(
            self,
            name=f"{self.name}@{offset}",
            size=size,
            offset=self.offset + offset,
            filesystem=facts.get("TYPE", ""),
            identity=_identity(facts, None),
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[FileLayer]:
        """Open for reading here and there, as a layer of all its bytes."""
        with contextlib.closing(_Descriptor(self.path)) as opened:
            if self.is_device:
                # A filesystem writes past the page cache of its device: what an earlier reader left there is old.
                kernel.forget_pages(opened.number)
            yield FileLayer(opened.number, self.size, base=self.offset, name=self.path)

    @contextlib.contextmanager
    def open_data(self) -> Iterator[FileLayer]:
        """Open for reading much of it, once: a device is read past the page cache if its driver lets us."""
        try:
            if not self.is_device or self.offset % self.block_size or self.size % self.block_size:
                raise OSError
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            with self.open() as layer:
                os.posix_fadvise(layer.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                yield layer
            return
        try:
            yield DirectLayer(descriptor, self.size, block_size=self.block_size, base=self.offset, name=self.path)
        finally:
            os.close(descriptor)

    def mounts(self) -> list[Mount]:
        """Return where this very volume is mounted: not its partitions."""
        devices = set(self.devices())
        return [mount for mount in all_mounts() if mount.device in devices]

    def devices(self) -> list[tuple[int, int]]:
        """Return (major, minor) of each block device that shows this volume: itself, or its loop devices.

        A window is shown by a partition's device, or by a loop device with that offset.
        """
        whole = [_numbers(os.stat(self.path).st_rdev)] if self.is_device else []
        whole += [loop.device for loop in loops_of(self.path) if loop.offset == 0]
        if self.offset == 0 and self.size == file_size(self.path):
            return whole
        windows = [loop.device for loop in loops_of(self.path) if loop.offset == self.offset]
        return windows + [part for disk in whole for part in _partitions(disk, self.offset, self.size)]

    def users(self) -> list[Mount]:
        """Return every mount of the volume or of a partition or loop device on it."""
        devices = {numbers for disk in self.devices() for numbers in (disk, *_partitions(disk))}
        devices |= {loop.device for loop in loops_of(self.path)}
        return [mount for mount in all_mounts() if mount.device in devices]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop device on a file: its numbers and where in the file it begins."""

    device: tuple[int, int]
    offset: int
    read_only: bool


def file_size(path: str) -> int:
    """Return the size of a file or block device, by seeking to its end."""
    with contextlib.closing(_Descriptor(path)) as opened:
        return os.lseek(opened.number, 0, os.SEEK_END)


def probe(path: str, *, offset: int = 0, size: int = 0) -> dict[str, str]:
    """Return what `blkid -p` finds at a place of a file or device: TYPE, UUID, PTTYPE, PART_ENTRY_UUID and more."""
    where = [f"--offset={offset}", f"--size={size}"] if size else []
    command = [find("blkid"), "--probe", "--output", "export", *where, "--", path]
    done = subprocess.run(
        command, capture_output=True, pass_fds=descriptors_behind(path), stdin=subprocess.DEVNULL, check=False
    )
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def descriptors_behind(path: str) -> list[int]:
    """Return the descriptor that a child has to inherit to see what we see at `/proc/self/fd/N`; else none."""
    match = re.fullmatch(r"/proc/self/fd/(\d+)", path)
    return [int(match[1])] if match else []


def default_name(path: str) -> str:
    """Return the name of a volume that the user gave none: the end of its path, of plain characters only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-.") or "volume"


def all_mounts() -> list[Mount]:
    """Return every mount of this mount namespace, from /proc/self/mountinfo; one of several devices for each."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, (filesystem, source, options) = left.split(), right.split(" ", 2)
        superblock = _parse_numbers(fields[2])
        # The superblock's own options say whether anything can write; a read-only bind mount does not.
        chosen = frozenset(options.strip().split(","))
        devices = _btrfs_members(_unescape(source)) if filesystem == "btrfs" else [superblock]
        point, number = _unescape(fields[4]), int(fields[0])
        found += [Mount(point, filesystem, "ro" in chosen, device, number, superblock, chosen) for device in devices]
    return found


def loops_of(path: str) -> list[Loop]:
    """Return the loop devices whose backing file is `path`."""
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    found = []
    for loop in Path("/sys/block").glob("loop*/loop"):
        try:
            backing = os.stat((loop / "backing_file").read_text().rstrip("\n"))
            if (backing.st_dev, backing.st_ino) == (wanted.st_dev, wanted.st_ino):
                read_only = (loop.parent / "ro").read_text().strip() == "1"
                numbers = _parse_numbers((loop.parent / "dev").read_text())
                found.append(Loop(numbers, int((loop / "offset").read_text()), read_only))
        except OSError:
            continue  # detached meanwhile, or its file is deleted
    return found


def _partitions(disk: tuple[int, int], offset: int = -1, size: int = -1) -> list[tuple[int, int]]:
    """Return the device numbers of a disk's partitions, or of the one at `offset` with `size`."""
    found = []
    for entry in Path(f"/sys/dev/block/{disk[0]}:{disk[1]}").glob("*/partition"):
        start = int((entry.parent / "start").read_text()) * 512
        length = int((entry.parent / "size").read_text()) * 512
        if offset < 0 or (start, length) == (offset, size):
            found.append(_parse_numbers((entry.parent / "dev").read_text()))
    return found


def _identity(facts: dict[str, str], device: int | None) -> dict[str, str]:
    """Return the names in `facts`, and those that udev keeps for a device, that stay with a volume."""
    names = {
        "filesystem_uuid": facts.get("UUID"),
        "partition_uuid": facts.get("PART_ENTRY_UUID"),
        "partition_table_uuid": facts.get("PTUUID"),
    }
    if device is not None:
        known = _udev(*_numbers(device))
        names["serial"] = known.get("ID_SERIAL_SHORT") or known.get("ID_SERIAL")
        names["wwn"] = known.get("ID_WWN")
        names["partition_uuid"] = names["partition_uuid"] or known.get("ID_PART_ENTRY_UUID")
    return {name: value for name, value in names.items() if value}


def _udev(major: int, minor: int) -> dict[str, str]:
    """Return the properties in udev's database of a block device; empty without udev."""
    try:
        lines = Path(f"/run/udev/data/b{major}:{minor}").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return dict(line[2:].split("=", 1) for line in lines if line.startswith("E:") and "=" in line)


def _btrfs_members(source: str) -> list[tuple[int, int]]:
    """Return every device of the mounted btrfs filesystem of which `source` is one (/sys/fs/btrfs/UUID/devices)."""
    try:
        device = _numbers(os.stat(source).st_rdev)
    except OSError:
        return []
    for devices in Path("/sys/fs/btrfs").glob("*/devices"):
        members = []
        with contextlib.suppress(OSError):  # another filesystem, and it was unmounted meanwhile
            for member in devices.iterdir():
                with contextlib.suppress(OSError):  # it was removed from its filesystem meanwhile
                    members.append(_parse_numbers((member / "dev").read_text()))
        if device in members:
            return members
    return [device]


def _numbers(device: int) -> tuple[int, int]:
    return os.major(device), os.minor(device)


def _parse_numbers(text: str) -> tuple[int, int]:
    major, minor = text.split(":")
    return int(major), int(minor)


def _unescape(field: str) -> str:
    """Undo the octal escapes of mountinfo."""
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class _Descriptor:
    """A path opened for reading; VolumeError, with what to do, if it cannot be."""

    def __init__(self, path: str) -> None:
        if DiskName.parse(path):
            raise VolumeError(
                f"{path}: a running machine's disk can be read only while it is held still",
                remedy="`blockferry backup` does that; or name an image or device that no machine uses.",
            )
        try:
            # Without O_NONBLOCK a FIFO would wait for its writer, for ever.
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            remedy = {
                FileNotFoundError: "Check the path; is the device attached?",
                PermissionError: "Run as root, or give your user read access to it.",
            }.get(type(error), "")
            raise VolumeError(f"{path}: {error.strerror}", remedy=remedy) from None

    def close(self) -> None:
        os.close(self.number)
