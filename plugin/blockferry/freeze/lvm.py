"""A logical volume in use is read from an LVM snapshot of it, which lasts as long as the backup.

LVM freezes the filesystem that is mounted from the volume while it takes the snapshot (device-mapper suspends with
"lockfs"). A thick snapshot holds as much as was free in the group, and is invalid from the moment that more than that
was written to the volume; a thin one has the room of its pool. Snapshots are tagged `blockferry`: those that a crash
left behind go at the next backup of the same volume. lvcreate(8), lvs(8).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import mmap
import os
import re
import secrets
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from blockferry.errors import VolumeError
from blockferry.freeze import CannotHoldError, entered
from blockferry.hookspecs import Declined, FreezeOptions, Frozen, hookimpl
from blockferry.programs import look_for, package_of
from blockferry.snapshot import Stability
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_TAG = "blockferry"

_SPARED = 5
"""One in so many free extents is left to others: thin pools grow into them."""


@hookimpl
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Hold a logical volume still by an LVM snapshot."""
    del options
    return entered("lvm", _held(volume), declined)


@hookimpl
def blockferry_thaw(path: str) -> None:
    """Remove the snapshots of a logical volume that nobody has open."""
    with contextlib.suppress(CannotHoldError, OSError):
        _remove_stale(_look_up(path))


@dataclasses.dataclass(frozen=True)
class _LogicalVolume:
    group: str
    name: str
    thin: bool
    extents: int
    free_extents: int

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"


@contextlib.contextmanager
def _held(volume: Volume) -> Iterator[Frozen]:
    origin = _look_up(volume.path)
    _remove_stale(origin)
    with contextlib.ExitStack() as made:
        path = _snapshot(origin, made)
        # Only a filesystem mounted from the very volume was made consistent: not one in a partition or a guest.
        stability = Stability.FROZEN if volume.mounts() else Stability.CRASH_CONSISTENT
        check = made.enter_context(_validity(origin, path))
        yield Frozen(
            dataclasses.replace(volume, path=path),
            stability,
            "LVM thin snapshot" if origin.thin else "LVM snapshot",
            check,
        )


def _look_up(path: str) -> _LogicalVolume:
    """Ask LVM about the logical volume that a volume is; raise CannotHoldError if it is none."""
    facts = os.stat(path)
    uuid = Path(f"/sys/dev/block/{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}/dm/uuid")
    match = (
        re.fullmatch(r"LVM-\w{32}(\w{32})\n", uuid.read_text())
        if stat.S_ISBLK(facts.st_mode) and uuid.exists()
        else None
    )
    if not match:
        raise CannotHoldError("it is not a logical volume")
    parts = re.fullmatch(r"(.{6})" + r"(.{4})" * 5 + r"(.{6})", match[1])
    dashed = "-".join(parts.groups()) if parts else ""
    fields = "vg_name,lv_name,pool_lv,lv_size,vg_free_count,vg_extent_size"
    rows = lvs_report("--options", fields, "--select", f'lv_uuid="{dashed}"')
    if len(rows) != 1:
        raise CannotHoldError("LVM does not list it")
    row = rows[0]
    extents = int(row["lv_size"]) // int(row["vg_extent_size"])
    return _LogicalVolume(row["vg_name"], row["lv_name"], bool(row["pool_lv"]), extents, int(row["vg_free_count"]))


def _room(origin: _LogicalVolume) -> int:
    """Return the extents of a thick snapshot: all that can ever be needed, if there are so many."""
    enough = origin.extents + origin.extents // 50 + 2  # the changes, and a table of 16 bytes a chunk of 4 KiB
    return min(enough, origin.free_extents - origin.free_extents // _SPARED)


def _snapshot(origin: _LogicalVolume, made: contextlib.ExitStack) -> str:
    """Take a snapshot, to be removed when `made` closes; return its path."""
    name = f"{origin.name}-blockferry-{secrets.token_hex(2)}"
    # A thin snapshot given a size would be a thick one; it is not to be activated at boot unless told so (-kn here).
    kind = ["--setactivationskip", "n"] if origin.thin else ["--extents", str(_room(origin))]
    if not origin.thin and not _room(origin):
        raise CannotHoldError(f"the group {origin.group} has no free extents for a snapshot")
    options = ["--snapshot", "--name", name, "--permission", "r", "--addtag", _TAG, "--yes", *kind]
    made.callback(remove_volume, f"{origin.group}/{name}")
    run_lvm("lvcreate", *options, origin.full_name)
    return f"/dev/{origin.group}/{name}"


@contextlib.contextmanager
def _validity(origin: _LogicalVolume, path: str) -> Iterator[Callable[[], None]]:
    """Keep the snapshot open, so that no other run takes it for stale; give a check that it holds what it should.

    An invalid snapshot answers every read with an error; past the page cache, that tells at once.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise CannotHoldError(f"the snapshot {path} cannot be opened: {error.strerror}") from None
    block = mmap.mmap(-1, mmap.PAGESIZE)  # direct I/O wants an aligned buffer

    def check() -> None:
        try:
            os.preadv(descriptor, [block], 0)
        except OSError:
            raise VolumeError(
                f"{origin.full_name}: its snapshot was full before the backup was done and is void",
                remedy=f"Free more extents in the group {origin.group} (vgs), or back up when less is written.",
            ) from None

    try:
        yield check
    finally:
        os.close(descriptor)


def _remove_stale(origin: _LogicalVolume) -> None:
    """Remove the snapshots that earlier, crashed backups of this volume left: nobody has them open."""
    rows = lvs_report(
        "--options", "lv_name,lv_device_open", "--select", f'lv_tags="{_TAG}" && origin="{origin.name}"', origin.group
    )
    for row in rows:
        if row["lv_device_open"] != "open" and re.fullmatch(
            rf"{re.escape(origin.name)}-blockferry-\w+", row["lv_name"]
        ):
            log.warning("removing the snapshot %s/%s that a crashed backup left", origin.group, row["lv_name"])
            remove_volume(f"{origin.group}/{row['lv_name']}")


def remove_volume(full_name: str) -> None:
    """Remove a snapshot, if it is there."""
    try:
        if lvs_report("--options", "lv_name", "--select", f'lv_full_name="{full_name}"'):
            run_lvm("lvremove", "--yes", "--force", full_name)
    except CannotHoldError as error:
        log.warning("the snapshot %s is left behind (%s): `lvremove %s` removes it", full_name, error, full_name)


def lvs_report(*arguments: str) -> list[dict[str, str]]:
    """Return the rows of `lvs`, sizes in bytes."""
    output = run_lvm("lvs", "--reportformat", "json", "--units", "b", "--nosuffix", *arguments)
    try:
        rows: list[dict[str, str]] = json.loads(output)["report"][0]["lv"]
    except (ValueError, KeyError, IndexError):
        raise CannotHoldError("lvs gave no report") from None
    return rows


def run_lvm(program: str, *arguments: str) -> str:
    """Run a program of LVM; raise CannotHoldError, with its last words, if it fails."""
    found = look_for(program)
    if found is None:
        raise CannotHoldError(f"{program} is not installed (it comes with {package_of(program)})")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise CannotHoldError(f"{program}: {' '.join(done.stderr.split())}")
    return done.stdout
