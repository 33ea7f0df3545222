"""The write road for a group: walk -> pack -> one image in disk order -> repository; every file looked at again after.

Nothing holds the filesystem still. What makes a file whole all the same: everything dirty is written out after the
file was seen and before it is read, and after the last read each file is looked at again. One that has changed, in its
times or in where it lies, is read anew through the filesystem; one that goes on changing is stored as it is and
reported. So a file is as it was at one instant, or said not to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pluggy

from blockferry import kernel
from blockferry.backup import Result
from blockferry.blockmap import Kind
from blockferry.errors import BaseUnusableError, DamagedSnapshotError, VolumeError
from blockferry.extents import ExtentSet
from blockferry.groups.definition import Group
from blockferry.groups.image import GroupImage
from blockferry.groups.packing import Packed, pack
from blockferry.groups.place import Filesystem
from blockferry.groups.scope import Scope
from blockferry.groups.second_look import SecondLook
from blockferry.groups.stored import read_table
from blockferry.groups.table import BESIDE, FileTable
from blockferry.groups.tracking import Tracking
from blockferry.groups.walk import Known, Walked, Walker, wait_out
from blockferry.layers import BaseLayer, Layer
from blockferry.progress import Progress
from blockferry.remembered import Remembered
from blockferry.repository import Base, Repository, plan
from blockferry.sets import without_shares
from blockferry.snapshot import Record, Snapshot, Stability, Tier, find, new_snapshot_id, now
from blockferry.state import locked
from blockferry.systemd import journal

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
class GroupResult:
    """What a backup of a group did, and which of its files are not stored as they should be."""

    result: Result
    entries: int
    problems: tuple[tuple[bytes, str], ...]

    def as_json(self) -> dict[str, Any]:
        """Return what `backup --json` prints of a group."""
        problems = [{"path": os.fsdecode(path), "reason": reason} for path, reason in self.problems]
        return self.result.as_json() | {
            "group": self.result.record.volume,
            "entries": self.entries,
            "problems": problems,
        }


def back_up_groups(
    manager: pluggy.PluginManager, wanted: Sequence[tuple[Group, Repository]], *, since: str, progress: Progress
) -> Iterator[GroupResult]:
    """Store groups of files that are on one filesystem, one snapshot each: what several of them have is read once.

    Each is all or nothing, but for single files that are reported. Raise NotNowError if another backup of a group
    runs, VolumeError if a root is no directory, and whatever the repository raises.
    """
    with contextlib.ExitStack() as held:
        begun = [held.enter_context(_begin(manager, *each, since, progress)) for each in wanted]
        planned = [held.enter_context(job.planned(*earlier)) for job, earlier in begun]
        disk = held.enter_context(_disk(planned))
        for (job, (earlier, _reason)), each in zip(begun, planned, strict=True):
            try:
                done = each.store(disk)
            except (BaseUnusableError, DamagedSnapshotError) as error:
                if earlier is None:
                    raise
                log.warning("%s; reading every file", error.message)
                with job.planned(None, error.message) as whole, _disk([whole]) as own:
                    done = whole.store(own)
            yield done


@contextlib.contextmanager
def _begin(
    manager: pluggy.PluginManager, group: Group, repository: Repository, since: str, progress: Progress
) -> Iterator[tuple[Job, tuple[Earlier | None, str]]]:
    """Begin the backup of a group; give what it is to do, and what it goes on from, or why from nothing."""
    scope = Scope.of(group)
    filesystem = Filesystem.of(manager, scope.root)
    snapshot, created, tracking = new_snapshot_id(), now(), Tracking.of(manager, filesystem, group)
    # What is dirty has no place yet, and would count, for a tracker, as written after the checkpoint.
    _sync(scope.root)
    with (
        locked(f"group-{group.name}", f"{group.name}: another backup of this group is running"),
        tracking.begun(snapshot, created, repository) as checkpoints,
    ):
        named = {"snapshot": snapshot, "created": created, "checkpoints": checkpoints}
        job = Job(group, repository, scope, filesystem, tracking, named, progress)
        yield job, find_earlier(repository, group, filesystem, since)


@dataclasses.dataclass(frozen=True)
class Job:
    """What the backup of one group is to do."""

    group: Group
    repository: Repository
    scope: Scope
    filesystem: Filesystem
    tracking: Tracking
    named: dict[str, Any]
    """What the record says of the snapshot itself."""
    progress: Progress
    began: int = dataclasses.field(default_factory=time.time_ns)
    """By the clock that files go by."""
    started: float = dataclasses.field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def planned(self, earlier: Earlier | None, reason: str) -> Iterator[GroupPlan]:
        """Walk the group, and plan its image; going on from an earlier snapshot, or not, and why not."""
        known = Known.of(earlier.table, earlier.began) if earlier else None
        with Walker(self.scope, self.filesystem.contents, known) as walker:
            with self.progress.count("files and directories") as advance:
                walked = walker.walk(advance)
            # What was written before a file was seen is on the disk, and known to a tracker, from here on; what is
            # written later changes the file's time.
            wait_out(walked.entries["ctime"])
            _sync(self.scope.root)
            unchanged = self.tracking.unchanged(earlier.record) if earlier else None
            # Chunks are taken over as they are: the size of the base's is ours.
            unit = earlier.record.unit if earlier else self.repository.unit(int(walked.pieces["length"].sum()))
            size = earlier.record.size if earlier else 0
            packed = pack(walked, earlier.table if earlier else None, size, unit, unchanged)
            yield GroupPlan(self, walker, walked, packed, self._record(packed, earlier, reason, unit), earlier)

    def _record(self, packed: Packed, earlier: Earlier | None, reason: str, unit: int) -> Record:
        """Return the record of the snapshot that is about to be stored."""
        filesystem, table = self.filesystem, packed.table
        return Record(
            **self.named,
            host=socket.gethostname(),
            volume=self.group.name,
            path=os.fsdecode(filesystem.root),
            size=packed.block_map.size,
            block_size=4096,
            filesystem=filesystem.type,
            identity=filesystem.identity,
            tier=Tier.CHANGED if earlier else Tier.USED,
            tier_reason="; ".join(filter(None, (reason, filesystem.reason))),
            method="extents of files" if filesystem.volume else "reading files",
            stability=Stability.LIVE,
            freeze="looking at each file again after it was read",
            unit=unit,
            bytes_used=int(table.extents["length"].sum()),
            bytes_changed=packed.read.total,
            base=earlier.snapshot.id if earlier else None,
            tracker=self.tracking.method if earlier else "",
            group={
                **self.group.as_json(),
                "table": list(packed.table_place),
                "entries": len(table),
                "began": self.began,
                "wasteful": packed.wasteful,
            },
            blockferry=importlib.metadata.version("blockferry"),
        )


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """A group that was walked, and whose image is planned."""

    job: Job
    walker: Walker
    walked: Walked
    packed: Packed
    record: Record
    earlier: Earlier | None

    def store(self, disk: Layer | None) -> GroupResult:
        """Store the group, of which `disk` has the content that has an address."""
        job, record, packed = self.job, self.record, self.packed
        journal.about(volume=record.volume, snapshot=record.snapshot)
        look = SecondLook(job.scope.root, self.walker, self.walked, packed)
        sealed: list[bytearray] = []

        def seal() -> dict[int, bytes | bytearray]:
            fresh, table = look.finish()
            sealed.append(table.to_bytes())
            return {packed.late[0]: fresh, packed.table_place[0]: sealed[0]}

        image = GroupImage(packed, record.unit, disk, look.read_file, seal, look.was_read)
        taken = packed.block_map.extents(Kind.SAME).align(record.unit, record.size)
        bases = [Base(self.earlier.snapshot, taken)] if self.earlier and taken else []
        work = plan(packed.block_map, record, bases).extents(Kind.DATA).total
        with job.progress.task("backup", work) as advance:
            stored = job.repository.store(image, packed.block_map, record, bases=bases, advance=advance)
        remember_table(stored.snapshot, sealed[0])
        seconds = time.monotonic() - job.started
        where = job.repository.reference
        result = Result(stored.snapshot, record, where, image.bytes_read, 0, stored.bytes_stored, seconds)
        problems = (*job.scope.missing(), *self.walked.problems, *look.problems)
        return GroupResult(result, len(packed.table), problems)


@contextlib.contextmanager
def _disk(planned: Sequence[GroupPlan]) -> Iterator[Layer | None]:
    """Open the device; what several groups have is read by way of the page cache, and so once."""
    volume = planned[0].job.filesystem.volume
    if volume is None:
        yield None
        return
    seen, shared = ExtentSet.empty(), ExtentSet.empty()
    for each in planned:
        runs = each.packed.runs[each.packed.runs["address"] != BESIDE]
        mine = ExtentSet.from_ranges(runs["address"], runs["address"] + runs["length"])
        shared = shared.union(seen.intersection(mine))
        seen = seen.union(mine)
    with volume.open_data() as disk, volume.open() as cached:
        # Reads are large, and not to be made larger.
        os.posix_fadvise(cached.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield Shared(disk, cached, shared) if shared else disk


class Shared(BaseLayer):
    """A device of which some extents will be read more than once, soon: these by way of the page cache."""

    def __init__(self, disk: Layer, cached: Layer, shared: ExtentSet) -> None:
        self.size = disk.size
        self.extents = disk.extents
        self._disk, self._cached, self._shared = disk, cached, shared

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""
        often = bool(self._shared.clip(offset, offset + len(buffer)))
        (self._cached if often else self._disk).read_into(offset, buffer)


def find_earlier(
    repository: Repository, group: Group, filesystem: Filesystem, since: str
) -> tuple[Earlier | None, str]:
    """Return the snapshot of the group to go on from, or None and the reason why there is none."""
    if since == "none":
        return None, "no earlier snapshot is to be used (--since none)"
    if "reuse" not in repository.capabilities:
        return None, "this repository takes nothing over from earlier snapshots"
    listed = without_shares(repository.snapshots(about_to_store=True))
    mine = [each for each in listed if each.volume == group.name]
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


def remember_table(snapshot: Snapshot, table: bytes | bytearray) -> None:
    """Keep the table of files of a snapshot: the next backup begins with it."""
    files = Remembered("groups")
    files.put(snapshot.id, table)
    files.keep(lambda _name: True, _MOST_TABLES)


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
