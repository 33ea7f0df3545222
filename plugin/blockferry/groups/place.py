"""The filesystem that a group is on: whether its files can be read by their places on the disk, and which disk."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pluggy

from blockferry.errors import VolumeError
from blockferry.groups.content import Contents
from blockferry.hookspecs import FilesOnDisk
from blockferry.volume import Mount, Volume, all_mounts


@dataclasses.dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem, at the root of a group."""

    root: bytes
    type: str
    volume: Volume | None
    """The device that files are read from; None if they are read one by one."""
    contents: Contents
    """What finds out where the content of a file is."""
    reason: str
    """Why files are read one by one, "" if they are not."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells this filesystem from others, as far as it is known."""
        return self.volume.identity if self.volume else {}

    @classmethod
    def of(cls, manager: pluggy.PluginManager, root: bytes) -> Filesystem:
        """Return the filesystem of a directory; raise VolumeError if it is none."""
        name = os.fsdecode(root)
        try:
            with os.scandir(root):
                facts = os.stat(root)
        except OSError as error:
            raise VolumeError(f"{name}: {error.strerror}", remedy="Check the group's volume and paths.") from None
        numbers = (os.major(facts.st_dev), os.minor(facts.st_dev))
        mount = next((each for each in all_mounts() if each.superblock == numbers), None)
        reasons: list[str] = []
        volume, on_disk = _on_disk(manager, mount, reasons) if mount else (None, None)
        contents = Contents(addressable=volume is not None, otherwise=on_disk.otherwise if on_disk else None)
        kind = mount.filesystem if mount else ""
        if volume:
            return cls(root, kind, volume, contents, "")
        what = "; ".join(reasons) or f"nobody knows where {kind or 'this filesystem'} has them on a device"
        return cls(root, kind, None, contents, f"files are read one by one: {what}")


def _on_disk(
    manager: pluggy.PluginManager, mount: Mount, reasons: list[str]
) -> tuple[Volume | None, FilesOnDisk | None]:
    """Return the device that files can be read from, and how, if there is one."""
    on_disk: FilesOnDisk | None = manager.hook.blockferry_group_extents(mount=mount, declined=reasons.append)
    if on_disk is None:
        return None, None
    try:
        device = Path(on_disk.device).resolve(strict=True)
        with device.open("rb"):
            return Volume.discover(device), on_disk
    except OSError as error:
        reasons.append(f"{on_disk.device}: {error.strerror}")
        return None, None
