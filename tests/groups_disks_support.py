"""Small real filesystems, and what a group's snapshot has to say of a tree on one."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockferry.errors import DamagedSnapshotError
from blockferry.groups.backup import GroupResult, back_up_groups
from blockferry.groups.definition import Group
from blockferry.groups.stored import StoredGroup, open_group
from blockferry.groups.table import ENTRY
from blockferry.layers import BaseLayer
from blockferry.manager import plugin_manager
from blockferry.progress import Silent
from blockferry.repository import Repository
from blockferry.snapshot import Snapshot
from simulation import MemoryRepository
from volumes_support import make_image, run

MKFS = {
    "ext4": ["mkfs.ext4", "-q"],
    "ext4-inline": ["mkfs.ext4", "-q", "-I", "512", "-O", "inline_data"],
    "ext4-seconds": ["mkfs.ext4", "-q", "-I", "128"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "btrfs-zstd": ["mkfs.btrfs", "-q"],
}
OPTIONS = {"btrfs-zstd": ["-o", "compress-force=zstd"]}
SIZES = {"xfs": 64 << 20, "btrfs": 128 << 20, "btrfs-zstd": 128 << 20}


@contextlib.contextmanager
def filesystem(kind: str, place: Path, size: int = 0) -> Iterator[Path]:
    """Make a filesystem, and mount it for as long as the context lasts."""
    point = place / "mounted"
    point.mkdir(parents=True)
    size = size or SIZES.get(kind, 32 << 20)
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point)
    else:
        image = make_image(place / "image", size)
        run(*MKFS[kind], image)
        run("mount", *OPTIONS.get(kind, []), image, point)
    try:
        yield point
    finally:
        run("umount", "--recursive", point)


class Memory(MemoryRepository):
    """The simulated repository, quick to read. Its tables are read from it: nothing of a test is remembered."""

    def __init__(self, unit: int = 64 << 10) -> None:
        super().__init__(frozenset({"reuse"}), unit)

    def open(self, snapshot: Snapshot) -> BaseLayer:
        return _Image(self, snapshot)


class _Image(BaseLayer):
    def __init__(self, repository: Memory, snapshot: Snapshot) -> None:
        archive = repository.archives[snapshot.id]
        self.chunks, self.unit, self.size = archive.chunks, repository.unit(0), archive.record.size
        self.extents = archive.block_map.extents(*archive.record.stored_kinds)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        place = 0
        while place < len(buffer):
            number, within = divmod(offset + place, self.unit)
            count = min(self.unit - within, len(buffer) - place)
            if number * self.unit not in self.chunks:
                raise DamagedSnapshotError(f"the chunk at {number * self.unit} is missing")
            buffer[place : place + count] = self.chunks[number * self.unit][within : within + count]
            place += count


def group_at(root: Path, name: str = "small", **what: Any) -> Group:
    return Group(name, str(root), what.pop("paths", (str(root),)), **what)


def back_up(root: Path, repository: Repository, since: str = "latest", **what: Any) -> GroupResult:
    """Back up everything below a directory."""
    wanted = [(group_at(root, **what), repository)]
    (result,) = back_up_groups(plugin_manager(), wanted, since=since, progress=Silent())
    return result


def opened(repository: Repository, result: GroupResult) -> StoredGroup:
    return open_group(repository, result.result.snapshot)


def contents(group: StoredGroup) -> list[bytes]:
    """Return what is stored of each row's content."""
    extents = group.image.extents
    image = np.zeros(group.record.size, np.uint8)
    for offset, piece in group.image.stream(extents, 4 << 20):
        image[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
    group.image.close()
    found = []
    for row in range(len(group.table)):
        made = bytearray(int(group.table.entries["size"][row]))
        for logical, place, length in group.pieces(row):
            assert extents.covers(place, place + length)
            made[logical : logical + length] = image[place : place + length].tobytes()
        found.append(bytes(made))
    return found


def tree_of(root: Path) -> dict[bytes, os.stat_result]:
    """Return everything below a directory of one filesystem, by path relative to it."""
    top = os.fsencode(root)
    found = {b"": os.lstat(top)}
    for above, directories, files in os.walk(top):
        for name in [*directories, *files]:
            path = os.path.join(above, name)
            found[os.path.relpath(path, top)] = os.lstat(path)
    return found


def assert_same(repository: Repository, result: GroupResult, root: Path, *, busy: bool = False) -> StoredGroup:
    """Assert that a snapshot says of every entry what the filesystem says of it, and has its content.

    `busy`: directories were written to after they were seen.
    """
    group = opened(repository, result)
    table, content = group.table, contents(group)
    rows = {path: row for row, path in enumerate(table.paths())}
    tree = tree_of(root)
    assert set(rows) == set(tree)
    assert len(table) == len(tree) == result.entries
    for path, facts in tree.items():
        row, full = rows[path], os.path.join(os.fsencode(root), path)
        entry = dict(zip(ENTRY.names or (), table.entries[row].tolist(), strict=True))
        is_file = stat.S_ISREG(facts.st_mode)
        assert entry["flags"] == 0, path
        for name, value in {
            "mode": facts.st_mode,
            "uid": facts.st_uid,
            "gid": facts.st_gid,
            "size": facts.st_size if is_file else 0,
            "mtime": facts.st_mtime_ns,
            "ctime": facts.st_ctime_ns,
            "inode": facts.st_ino,
            "rdev": facts.st_rdev,
        }.items():
            if busy and stat.S_ISDIR(facts.st_mode) and name in {"mtime", "ctime"}:
                continue
            assert entry[name] == value, (path, name, entry[name], value)
        if path:
            assert entry["parent"] == rows[os.path.dirname(path)], path
        if stat.S_ISLNK(facts.st_mode):
            assert table.target(row) == os.readlink(full)
        attributes = {os.fsencode(n): os.getxattr(full, n, follow_symlinks=False) for n in names_of_attributes(full)}
        assert table.attributes(row) == attributes, path
        first = rows[first_link(tree, path)] if facts.st_nlink > 1 and not stat.S_ISDIR(facts.st_mode) else row
        same = {row, first} | {entry["link"]} - {-1}
        assert len({int(table.entries["inode"][each]) for each in same}) == 1
        if is_file:
            source = row if entry["link"] < 0 else entry["link"]
            assert content[source] == Path(os.fsdecode(full)).read_bytes(), path
    inodes = {(facts.st_ino, stat.S_IFMT(facts.st_mode)) for facts in tree.values()}
    assert int((table.entries["link"] < 0).sum()) == len(inodes), "of each inode one entry is no further link"
    return group


def names_of_attributes(path: bytes) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []


def first_link(tree: dict[bytes, os.stat_result], path: bytes) -> bytes:
    return next(each for each, facts in tree.items() if facts.st_ino == tree[path].st_ino)


def reflink(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=always", str(source), str(target)], check=True)
