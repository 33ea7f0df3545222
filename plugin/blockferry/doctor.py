"""What of this host's programs blockferry can use, and how to get what is missing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pluggy

from blockferry.programs import look_for, package_of


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked for: what was found ("" if nothing), what for, and how to get it."""

    name: str
    found: str
    purpose: str
    remedy: str
    needed: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the finding as `doctor --json` prints it."""
        return dataclasses.asdict(self)


_PROGRAMS = (
    # name, how it says its version, what for
    ("borg", "--version", "borg repositories"),
    ("restic", "version", "restic repositories (0.18 or later)"),
    ("blkid", "--version", "what a volume holds"),
    ("wipefs", "--version", "restoring to devices"),
    ("setpriv", "--version", "restic ending when blockferry does"),
    ("sfdisk", "--version", "disks and images with partitions"),
    ("fusermount3", "--version", "feeding restic"),
    ("losetup", "--version", "hot restore"),
    ("udevadm", "--version", "devices that restore themselves"),
    ("systemctl", "--version", "backups and restores that begin by themselves"),
    ("lvs", "--version", "freezing and tracking logical volumes"),
    ("dmsetup", "--version", "tracking device-mapper volumes"),
    ("thin_delta", "--version", "tracking thin volumes and dm-era"),
    ("bpftrace", "--version", "tracking any block device"),
    ("qemu-img", "--version", "disks of running virtual machines"),
    ("nbdfuse", "--version", "disks of running virtual machines"),
    ("nbdinfo", "--version", "disks of running virtual machines"),
    ("nbdkit", "--version", "serving a restore to other hosts"),
)


def examine(manager: pluggy.PluginManager) -> list[Finding]:
    """Look for every program, kernel feature and plugin; needed are blkid and one of borg and restic."""
    found = {name: _version(name, option) for name, option, _purpose in _PROGRAMS}
    no_tool = not (found["borg"] or found["restic"])
    programs = [
        Finding(
            name,
            found[name],
            purpose,
            f"install the package {package_of(name)}",
            needed=name == "blkid" or (name in {"borg", "restic"} and no_tool),
        )
        for name, _option, purpose in _PROGRAMS
    ]
    fuse = "/dev/fuse" if os.access("/dev/fuse", os.R_OK | os.W_OK) else ""
    root = "yes" if os.geteuid() == 0 else ""
    return [
        *programs,
        Finding("FUSE device", fuse, "feeding restic", "modprobe fuse, and let your user open /dev/fuse"),
        Finding("root", root, "devices, and asking mounted filesystems", "use sudo; image files need no root"),
        *(
            Finding(f"plugin {name}", _origin(plugin), "", "")
            for name, plugin in sorted(manager.list_name_plugin(), key=lambda pair: pair[0])
            if plugin is not None
        ),
    ]


def _version(name: str, option: str) -> str:
    """Return the first line that a program says of its version, "" if it is not there or does not run."""
    path = look_for(name)
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, option], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return f"{lines[0].strip()} ({path})" if lines else path


def _origin(plugin: object) -> str:
    """Return where a plugin's code lies."""
    source = getattr(plugin, "__file__", None) or type(plugin).__module__
    return str(Path(source)) if source else "built in"
