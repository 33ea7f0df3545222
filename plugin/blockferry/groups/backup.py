"""The write road for a group: walk -> pack -> one image in disk order -> repository; every file looked at again after.

Nothing holds the filesystem still. What makes a file whole all the same: everything dirty is written out after the
file was seen and before it is read, and after the last read each file is looked at again. One that has changed, in its
times or in where it lies, is read anew through the filesystem; one that goes on changing is stored as it is and
reported. So a file is as it was at one instant, or said not to be.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import socket
import time

from blockferry import kernel
from blockferry.backup import Result
from blockferry.blockmap import Kind
from blockferry.errors import BaseUnusableError, DamagedSnapshotError, VolumeError
from blockferry.groups.again import SecondLook
from blockferry.groups.content import Contents
from blockferry.groups.definition import Group
from blockferry.groups.image import GroupImage
from blockferry.groups.packing import Packed, pack
from blockferry.groups.place import Filesystem
from blockferry.groups.scope import Scope
from blockferry.groups.stored import read_table
from blockferry.groups.table import FileTable
from blockferry.groups.walk import Known, Walker, wait_out
from blockferry.progress import Progress
from blockferry.remembered import Remembered
from blockferry.repository import Base, Repository, plan
from blockferry.snapshot import Record, Snapshot, Stability, Tier, find, new_snapshot_id, now

log = logging.getLogger(__name__)

_MOST_TABLES = 8
_MOST_LOOKED_AT = 16
"""Snapshots of the same name among which one to go on from is looked for."""


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The snapshot that a backup of a group goes on from."""

    snapshot: Snapshot
    record: Record
    table: FileTable
    began: int


@dataclasses.dataclass(frozen=True)
class _Began:
    """When a backup began: by the clock that files go by, in ns, and by one that is never set."""

    at: int = dataclasses.field(default_factory=time.time_ns)
    clock: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a backup is to do."""

    group: Group
    repository: Repository
    scope: Scope
    filesystem: Filesystem
    began: _Began
    progress: Progress


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """What a backup of a group did, and which of its files are not stored as they should be."""

    result: Result
    entries: int
    problems: tuple[tuple[bytes, str], ...]


def back_up_group(group: Group, repository: Repository, *, since: str, progress: Progress) -> GroupResult:
    """Store a group of files as one snapshot. All or nothing, but for single files that are reported.

    Raise VolumeError if the root is no directory, and whatever the repository raises.
    """
    began = _Began()
    scope = Scope.of(group)
    filesystem = Filesystem.of(scope.root)
    missing = list(scope.missing())
    _sync(scope.root)
    earlier, reason = find_earlier(repository, group, filesystem, since)
    job = _Job(group, repository, scope, filesystem, began, progress)
    try:
        stored = _store(job, earlier, reason)
    except (BaseUnusableError, DamagedSnapshotError) as error:
        if not earlier:
            raise
        log.warning("%s; reading every file", error.message)
        stored = _store(job, None, error.message)
    return dataclasses.replace(stored, problems=(*missing, *stored.problems))


def _store(job: _Job, earlier: Earlier | None, reason: str) -> GroupResult:
    """Walk, pack and store, going on from an earlier snapshot or not."""
    group, repository, scope, filesystem, progress = job.group, job.repository, job.scope, job.filesystem, job.progress
    contents = Contents(
        addressable=filesystem.addressable, checks_flags=filesystem.checks_flags, device=os.stat(scope.root).st_dev
    )
    known = Known.of(earlier.table, earlier.began) if earlier else None
    with Walker(scope, contents, known) as walker, filesystem.disk() as disk:
        with progress.task("walk", 0) as advance:
            walked = walker.walk(advance)
        wait_out(walked.entries["ctime"])
        _sync(scope.root)
        # Chunks are taken over as they are.
        unit = earlier.record.unit if earlier else repository.unit(int(walked.pieces["length"].sum()))
        packed = pack(walked, earlier.table if earlier else None, earlier.record.size if earlier else 0, unit)
        record = _describe(group, filesystem, packed, earlier, reason, unit, job.began.at)
        look = SecondLook(scope.root, walker, walked, packed)
        image = GroupImage(packed, unit, disk, look.read_file, look.seal)
        taken = packed.block_map.extents(Kind.SAME).align(unit, record.size)
        bases = [Base(earlier.snapshot, taken)] if earlier and taken else []
        work = plan(packed.block_map, record, bases).extents(Kind.DATA).total
        with progress.task("backup", work) as advance:
            stored = repository.store(image, packed.block_map, record, bases=bases, advance=advance)
    remember_table(stored.snapshot, look.sealed)
    seconds = time.monotonic() - job.began.clock
    result = Result(stored.snapshot, record, image.bytes_read, 0, stored.bytes_stored, seconds)
    return GroupResult(result, len(packed.table), (*walked.problems, *look.problems))


def find_earlier(
    repository: Repository, group: Group, filesystem: Filesystem, since: str
) -> tuple[Earlier | None, str]:
    """Return the snapshot of the group to go on from, or None and the reason why there is none."""
    if since == "none":
        return None, "no earlier snapshot is to be used (--since none)"
    if "reuse" not in repository.capabilities:
        return None, "this repository takes nothing over from earlier snapshots"
    mine = [each for each in repository.snapshots(about_to_store=True) if each.volume == group.name]
    if since != "latest":
        mine = [find(mine, since)]
    reason = "" if mine else "no earlier snapshot of it is in the repository"
    for snapshot in mine[: -_MOST_LOOKED_AT - 1 : -1]:
        try:
            record, _map = repository.describe(snapshot)
            if record.group and _is_here(record, filesystem):
                if record.group.get("wasteful"):
                    reason = f"snapshot {snapshot.id} holds much that is not in use any more: everything is packed anew"
                    break
                table = read_table(repository, snapshot, record, Remembered("groups"))
                return Earlier(snapshot, record, table, int(record.group["began"])), ""
        except (DamagedSnapshotError, KeyError, ValueError, TypeError) as error:
            return None, f"snapshot {snapshot.id} cannot be gone on from: {error}"
        reason = reason or f"snapshot {snapshot.id} is of another filesystem or directory, or of a volume"
    return None, reason


def _is_here(record: Record, filesystem: Filesystem) -> bool:
    """Tell whether a snapshot is of this directory of this filesystem. Another host's group may have the same name."""
    root = (record.group or {}).get("root")
    return record.identity == filesystem.identity and root == os.fsdecode(filesystem.root)


def remember_table(snapshot: Snapshot, table: bytes) -> None:
    """Keep the table of files of a snapshot: the next backup begins with it."""
    files = Remembered("groups")
    files.put(snapshot.id, table)
    files.keep(lambda _name: True, _MOST_TABLES)


def _describe(
    group: Group,
    filesystem: Filesystem,
    packed: Packed,
    earlier: Earlier | None,
    reason: str,
    unit: int,
    began: int,
) -> Record:
    """Return the record of a snapshot that is about to be stored."""
    table = packed.table
    return Record(
        snapshot=new_snapshot_id(),
        created=now(),
        host=socket.gethostname(),
        volume=group.name,
        path=os.fsdecode(filesystem.root),
        size=packed.block_map.size,
        block_size=4096,
        filesystem=filesystem.type,
        identity=filesystem.identity,
        tier=Tier.CHANGED if earlier else Tier.USED,
        tier_reason="; ".join(filter(None, (reason, filesystem.reason))),
        method="extents of files" if filesystem.addressable else "reading files",
        stability=Stability.LIVE,
        freeze="looking at each file again after it was read",
        unit=unit,
        bytes_used=int(table.extents["length"].sum()),
        bytes_changed=packed.read.total,
        base=earlier.snapshot.id if earlier else None,
        group={
            **group.as_json(),
            "table": list(packed.table_place),
            "entries": len(table),
            "began": began,
            "wasteful": packed.wasteful,
        },
        blockferry=importlib.metadata.version("blockferry"),
    )


def _sync(root: bytes) -> None:
    """Write out everything dirty of the filesystem that a directory is on."""
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            kernel.syncfs(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise VolumeError(
            f"{os.fsdecode(root)}: what was written last cannot be written out: {error.strerror}",
            remedy="Look at the kernel log: the disk may be failing, or full.",
        ) from None
