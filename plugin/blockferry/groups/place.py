"""The filesystem that a group is on: whether its files can be read by their places on the disk, and that disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blockferry.errors import VolumeError
from blockferry.layers import Layer
from blockferry.volume import Volume, all_mounts

_ADDRESSABLE = ("ext2", "ext3", "ext4", "xfs")
"""Where the address that FIEMAP gives is one of the device: btrfs has addresses of its own."""


@dataclasses.dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem, at the root of a group."""

    root: bytes
    type: str
    identity: dict[str, str]
    device: str
    """The block device that it lies on; "" if files are to be read through the filesystem."""
    reason: str
    """Why they are."""

    @property
    def addressable(self) -> bool:
        """Whether the content of files is read from the device."""
        return bool(self.device)

    @property
    def checks_flags(self) -> bool:
        """Whether single files may be stored in a way of their own."""
        return self.type.startswith("ext")

    @classmethod
    def of(cls, root: bytes) -> Filesystem:
        """Return the filesystem of a directory; raise VolumeError if it is none."""
        name = os.fsdecode(root)
        try:
            facts = os.stat(root)
            if not stat.S_ISDIR(facts.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise VolumeError(f"{name}: {error.strerror}", remedy="Check the group's volume and paths.") from None
        numbers = (os.major(facts.st_dev), os.minor(facts.st_dev))
        mount = next((each for each in all_mounts() if each.superblock == numbers), None)
        kind = mount.filesystem if mount else ""
        reason = _why_not(kind, mount.options if mount else frozenset(), numbers)
        if reason:
            return cls(root, kind, {}, "", reason)
        device = f"/dev/block/{numbers[0]}:{numbers[1]}"
        try:
            with open(device, "rb"):
                volume = Volume.discover(os.path.realpath(device))
        except OSError as error:
            return cls(root, kind, {}, "", f"files are read one by one: {device}: {error.strerror}")
        return cls(root, kind, volume.identity, volume.path, "")

    @contextlib.contextmanager
    def disk(self) -> Iterator[Layer | None]:
        """Open the device for reading past the page cache; None if there is none."""
        if not self.device:
            yield None
            return
        with Volume.discover(self.device).open_data() as disk:
            yield disk


def _why_not(kind: str, options: frozenset[str], numbers: tuple[int, int]) -> str:
    """Return why files of such a filesystem cannot be read by their places on the device; "" if they can."""
    if kind not in _ADDRESSABLE:
        return f"files are read one by one: {kind or 'this filesystem'} does not say where they lie on a device"
    if any(option.startswith("rtdev") for option in options):
        return "files are read one by one: some lie on a realtime device"
    if kind.startswith("ext"):
        name = Path(f"/sys/dev/block/{numbers[0]}:{numbers[1]}").resolve().name
        with contextlib.suppress(OSError):
            if "data=journal" in Path(f"/proc/fs/ext4/{name}/options").read_text().split():
                return "files are read one by one: their data goes through the journal"
    return ""
