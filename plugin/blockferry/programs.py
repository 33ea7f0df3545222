"""The system's own programs: where they are, and what brings them."""

from __future__ import annotations

import os
import platform
import shutil
from typing import NamedTuple

from blockferry.errors import ToolMissingError

KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "134217728", "MALLOC_MMAP_THRESHOLD_": "134217728"}
"""The environment of a process that makes and drops buffers of a chunk's size all the time, as borg does and a hot
restore: glibc must not map and unmap each (mallopt(3))."""

NO_ALGEBRA = {"OPENBLAS_NUM_THREADS": "1"}
"""That of one that loads numpy, and multiplies no matrices: OpenBLAS starts no threads, which would spin."""


class Packages(NamedTuple):
    """What a program comes with, in each family of systems."""

    debian: str
    fedora: str
    arch: str


def _same(name: str) -> Packages:
    return Packages(name, name, name)


_THIN = Packages("thin-provisioning-tools", "device-mapper-persistent-data", "thin-provisioning-tools")
_MOUNT = Packages("mount", "util-linux", "util-linux")

PACKAGES = {
    "blkid": _same("util-linux"),
    "borg": Packages("borgbackup", "borgbackup", "borg"),
    "bpftrace": _same("bpftrace"),
    "cat": _same("coreutils"),
    "dmsetup": Packages("dmsetup", "device-mapper", "device-mapper"),
    "env": _same("coreutils"),
    "era_invalidate": _THIN,
    "fusermount3": _same("fuse3"),
    "libudev": Packages("libudev1", "systemd-libs", "systemd-libs"),
    "losetup": _MOUNT,
    "lvcreate": _same("lvm2"),
    "lvremove": _same("lvm2"),
    "lvs": _same("lvm2"),
    "mount": _MOUNT,
    "nbdfuse": Packages("libnbd-bin", "nbdfuse", "libnbd"),
    "nbdinfo": Packages("libnbd-bin", "libnbd", "libnbd"),
    "nbdkit": _same("nbdkit"),
    "qemu-img": Packages("qemu-utils", "qemu-img", "qemu-img"),
    "restic": _same("restic"),
    "setpriv": _same("util-linux"),
    "sfdisk": Packages("fdisk", "util-linux", "util-linux"),
    "systemctl": _same("systemd"),
    "systemd-tmpfiles": _same("systemd"),
    "systemd-analyze": _same("systemd"),
    "thin_delta": _THIN,
    "udevadm": Packages("udev", "systemd-udev", "systemd"),
    "umount": _MOUNT,
    "wipefs": _same("util-linux"),
}
"""Every program that blockferry looks for, and a library."""

_FAMILIES = {"debian": 0, "ubuntu": 0, "fedora": 1, "rhel": 1, "centos": 1, "arch": 2}
_NAMES = ("Debian", "Fedora", "Arch")


def look_for(name: str) -> str | None:
    """Return the path of a program, None if it is not there. Those for root are found by others, too."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def find(name: str) -> str:
    """Return the path of a program; raise ToolMissingError, naming the package that brings it, if it is not there."""
    found = look_for(name)
    if found is None:
        raise ToolMissingError(f"{name} is not installed", remedy=f"Install the package {package_of(name)}.")
    return found


def package_of(name: str) -> str:
    """Return the package that brings a program: what it is called on this system, and after that on others."""
    packages = PACKAGES.get(name)
    if packages is None:
        return f"that brings {name}"
    family = _family()
    mine = packages[family]
    others = [
        f"{system}: {package}"
        for number, (system, package) in enumerate(zip(_NAMES, packages, strict=True))
        if number != family and package != mine
    ]
    return f"{mine} ({', '.join(others)})" if others else mine


def _family() -> int:
    """Return of which family this system is, by /etc/os-release; Debian's if it is of none that we know."""
    try:
        said = platform.freedesktop_os_release()
    except OSError:
        said = {}
    names = [said.get("ID", ""), *said.get("ID_LIKE", "").split()]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), 0)
