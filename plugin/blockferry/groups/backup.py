"""The write road for a group: walk -> pack -> one image in disk order -> repository; every file looked at again after.

Nothing holds the filesystem still. What makes a file whole all the same: everything dirty is written out after the
file was seen and before it is read, and after the last read each file is looked at again. One that has changed, in its
times or in where it lies, is read anew through the filesystem; one that goes on changing is stored as it is and
reported. So a file is as it was at one instant, or said not to be.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import logging
import os
import socket
import time

import numpy as np

from blockferry import kernel
from blockferry.backup import Result
from blockferry.blockmap import Kind
from blockferry.errors import DamagedSnapshotError, VolumeError
from blockferry.groups.content import PIECE, Contents
from blockferry.groups.definition import Group
from blockferry.groups.image import GroupImage, open_row
from blockferry.groups.packing import Packed, pack
from blockferry.groups.place import Filesystem
from blockferry.groups.scope import Scope
from blockferry.groups.stored import read_table
from blockferry.groups.table import BESIDE, CHANGED, EXTENT, GONE, UNREADABLE, FileTable
from blockferry.groups.walk import Known, Seen, State, Walked, Walker, wait_out
from blockferry.progress import Progress
from blockferry.remembered import Remembered
from blockferry.repository import Base, Repository, plan
from blockferry.snapshot import Record, Snapshot, Stability, Tier, find, new_snapshot_id, now

log = logging.getLogger(__name__)

_TRIES = 3
_MOST_TABLES = 8


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


def back_up_group(group: Group, repository: Repository, *, since: str, progress: Progress) -> GroupResult:
    """Store a group of files as one snapshot. All or nothing, but for single files that are reported.

    Raise VolumeError if the root is no directory, and whatever the repository raises.
    """
    began, began_ns = time.monotonic(), time.time_ns()
    scope = Scope.of(group)
    filesystem = Filesystem.of(scope.root)
    _sync(scope.root)
    earlier, reason = find_earlier(repository, group, filesystem, since)
    contents = Contents(addressable=filesystem.addressable, checks_flags=filesystem.checks_flags)
    known = Known.of(earlier.table, earlier.began) if earlier else None
    with Walker(scope, contents, known) as walker, filesystem.disk() as disk:
        with progress.task("walk", 0) as advance:
            walked = walker.walk(advance)
        wait_out(int(walked.entries["ctime"].max(initial=0)))
        _sync(scope.root)
        unit = repository.unit(earlier.record.size if earlier else int(walked.pieces["length"].sum()))
        packed = pack(walked, earlier.table if earlier else None, earlier.record.size if earlier else 0, unit)
        record = _describe(group, filesystem, packed, earlier, reason, unit, began_ns)
        run = _Run(scope.root, walker, walked, packed)
        image = GroupImage(packed, unit, disk, run.read_file, run.seal)
        taken = packed.block_map.extents(Kind.SAME).align(unit, record.size)
        bases = [Base(earlier.snapshot, taken)] if earlier and taken else []
        work = plan(packed.block_map, record, bases).extents(Kind.DATA).total
        with progress.task("backup", work) as advance:
            stored = repository.store(image, packed.block_map, record, bases=bases, advance=advance)
    remember_table(stored.snapshot, run.sealed)
    seconds = time.monotonic() - began
    result = Result(stored.snapshot, record, image.bytes_read, 0, stored.bytes_stored, seconds)
    return GroupResult(result, len(packed.table), (*walked.problems, *run.problems))


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
    if not mine:
        return None, "no earlier snapshot of it is in the repository"
    newest = mine[-1]
    try:
        record, _map = repository.describe(newest)
        reason = _unfit(record, filesystem)
        if reason or record.group is None:
            return None, f"snapshot {newest.id} {reason}"
        table = read_table(repository, newest, record, Remembered("groups"))
        return Earlier(newest, record, table, int(record.group["began"])), ""
    except (DamagedSnapshotError, KeyError, ValueError, TypeError) as error:
        return None, f"snapshot {newest.id} cannot be gone on from: {error}"


def _unfit(record: Record, filesystem: Filesystem) -> str:
    """Return why a backup cannot go on from a snapshot, "" if it can."""
    if record.group is None:
        return "is of a volume"
    if record.identity != filesystem.identity or record.group.get("root") != os.fsdecode(filesystem.root):
        return "is of another filesystem or directory"
    if record.group.get("wasteful"):
        return "holds much that is not in use any more: everything is packed anew"
    return ""


def remember_table(snapshot: Snapshot, table: bytes) -> None:
    """Keep the table of files of a snapshot: the next backup begins with it."""
    files = Remembered("groups")
    files.put(snapshot.id, table)
    files.keep(lambda _name: True, _MOST_TABLES)


class _Run:
    """One backup, from the moment that its image is planned."""

    def __init__(self, root: bytes, walker: Walker, walked: Walked, packed: Packed) -> None:
        self.root = root
        self.walker = walker
        self.walked = walked
        self.packed = packed
        self.problems: list[tuple[bytes, str]] = []
        self.sealed = b""

    def read_file(self, row: int, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from a file, through the filesystem; what it lacks reads as zeros, and is seen afterwards."""
        try:
            descriptor = open_row(self.root, self.packed.table.path(row))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                buffer[:] = bytes(len(buffer))
                return
            raise VolumeError(f"{self._name(row)}: cannot be read: {error.strerror}") from None
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not count:
                    buffer[done:] = bytes(len(buffer) - done)
                    break
                done += count
        except OSError as error:
            raise VolumeError(f"{self._name(row)}: cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def seal(self) -> dict[int, bytes]:
        """Look at every file that was read again; return what of them was read anew, and the table of all files."""
        late, room = self.packed.late
        fresh = bytearray()
        table = self.packed.table
        replaced: dict[int, tuple[int, int]] = {}
        rows, seen = self._seen()
        for row, state in zip(rows, self.walker.differing(seen), strict=True):
            if state is State.SAME:
                continue
            again = self._again(row, room - len(fresh)) if state is not State.GONE else State.GONE
            match again:
                case bytes() as content:
                    replaced[row] = (late + len(fresh), len(content))
                    fresh += content
                case State.GONE:
                    table.entries["flags"][row] |= GONE
                    replaced[row] = (0, 0)
                case State.WRITTEN if state is State.WRITTEN:
                    table.entries["flags"][row] |= CHANGED
                    self.problems.append((self._path(row), "it changed while it was read"))
                case _:
                    table.entries["flags"][row] |= UNREADABLE
                    table.entries["size"][row] = 0
                    replaced[row] = (0, 0)
                    self.problems.append((self._path(row), "it changed while it was read, and could not be read again"))
        table = _replace(table, replaced)
        self.sealed = table.to_bytes()
        return {late: bytes(fresh), self.packed.table_place[0]: self.sealed}

    def _seen(self) -> tuple[list[int], list[Seen]]:
        """Return what was seen of the files that were read, with their rows."""
        walked, entries = self.walked, self.walked.entries
        counts = np.diff(walked.piece_ends, prepend=0)
        rows = np.flatnonzero(counts).tolist()
        raw = walked.pieces.tobytes()
        ends = (walked.piece_ends * PIECE.itemsize).tolist()
        begins = ((walked.piece_ends - counts) * PIECE.itemsize).tolist()
        inodes, sizes, ctimes = (entries[column].tolist() for column in ("inode", "size", "ctime"))
        paths = list(self.packed.table.paths())
        root = self.root.rstrip(b"/") + b"/"
        seen = [
            Seen(root + paths[row], inodes[row], sizes[row], ctimes[row], raw[begins[row] : ends[row]]) for row in rows
        ]
        return rows, seen

    def _again(self, row: int, room: int) -> bytes | State:
        """Read a file anew, in one piece, and have its entry say what it is now; a State if that cannot be done."""
        for _ in range(_TRIES):
            try:
                descriptor = open_row(self.root, self.packed.table.path(row))
            except OSError:
                return State.GONE
            try:
                before = os.fstat(descriptor)
                if before.st_size > room or before.st_mode & 0o170000 != 0o100000:
                    return State.WRITTEN
                wait_out(before.st_ctime_ns)
                content = _whole(descriptor, before.st_size)
                after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if (before.st_ctime_ns, before.st_size, len(content)) == (after.st_ctime_ns, after.st_size, after.st_size):
                entry = self.packed.table.entries[row]
                entry["mode"], entry["uid"], entry["gid"] = after.st_mode, after.st_uid, after.st_gid
                entry["size"], entry["mtime"], entry["ctime"] = after.st_size, after.st_mtime_ns, after.st_ctime_ns
                entry["inode"] = after.st_ino
                return content
        return State.WRITTEN

    def _path(self, row: int) -> bytes:
        return os.path.join(self.root, self.packed.table.path(row))

    def _name(self, row: int) -> str:
        return os.fsdecode(self._path(row))


def _whole(descriptor: int, size: int) -> bytes:
    """Return what a file has, as far as `size`, or one byte more if it has grown."""
    parts, done = [], 0
    while done <= size:
        part = os.pread(descriptor, size + 1 - done, done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _replace(table: FileTable, replaced: dict[int, tuple[int, int]]) -> FileTable:
    """Return a table in which some files have one extent, (place, length), or none, instead of what they had."""
    if not replaced:
        return table
    owners = np.repeat(np.arange(len(table)), np.diff(table.extent_ends, prepend=0))
    rows = np.array(sorted(replaced))
    stay = ~np.isin(owners, rows)
    new = [(row, *replaced[row]) for row in rows.tolist() if replaced[row][1]]
    added = np.array([(0, length, place, BESIDE) for _row, place, length in new], EXTENT)
    every = np.concatenate([table.extents[stay], added])
    owner = np.concatenate([owners[stay], np.array([row for row, _place, _length in new], np.int64)])
    order = np.lexsort((every["logical"], owner))
    return dataclasses.replace(
        table,
        extents=every[order],
        extent_ends=np.cumsum(np.bincount(owner, minlength=len(table))).astype(np.int64),
    )


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
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kernel.syncfs(descriptor)
    finally:
        os.close(descriptor)
