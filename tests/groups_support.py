"""Groups of files made from real directory trees, without any of what reads volumes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockferry.blockmap import BlockMap
from blockferry.extents import ExtentSet
from blockferry.groups.backup import back_up_groups
from blockferry.groups.definition import Group
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import ENTRY, EXTENT, FileTable, pack_attributes
from blockferry.layers import BaseLayer
from blockferry.manager import plugin_manager, repository_named
from blockferry.progress import Silent
from blockferry.repository import Advance, Repository
from blockferry.snapshot import Record, Snapshot, Stability, Tier, new_snapshot_id, now
from commands_support import Depot

UNIT = 4096
FLAGS: dict[bytes, int] = {}
"""By name: what an entry is to be flagged with."""
FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


class Memory(BaseLayer):
    """An image in memory, which counts how much of it is read."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content
        self.size = len(content)
        self.extents = ExtentSet.whole(self.size)
        self.bytes_read = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]
        self.bytes_read += len(buffer)


@dataclasses.dataclass
class Builder:
    """Rows and bytes of a group, as they come."""

    rows: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    names: list[bytes] = dataclasses.field(default_factory=list)
    extents: list[list[tuple[int, int, bytes]]] = dataclasses.field(default_factory=list)
    texts: dict[bytes, int] = dataclasses.field(default_factory=dict)
    links: dict[int, int] = dataclasses.field(default_factory=dict)

    def add(self, path: str | bytes, name: bytes, parent: int) -> int:
        """Add what is at a path, and what is below it; return its row."""
        facts, row = os.lstat(path), len(self.rows)
        kind = stat.S_IFMT(facts.st_mode)
        shared = kind != stat.S_IFDIR and facts.st_nlink > 1
        link = self.links.setdefault(facts.st_ino, row) if shared else row
        attributes = {
            os.fsencode(each): os.getxattr(path, each, follow_symlinks=False)
            for each in os.listxattr(path, follow_symlinks=False)
        }
        text = self._text(os.fsencode(os.readlink(path))) if kind == stat.S_IFLNK else -1
        self.rows.append(
            (
                parent,
                facts.st_mode,
                facts.st_uid,
                facts.st_gid,
                FLAGS.get(name, 0),
                -1 if link == row else link,
                text,
                self._text(pack_attributes(attributes)) if attributes else -1,
                facts.st_size,
                facts.st_mtime_ns,
                facts.st_ctime_ns,
                facts.st_ino,
                facts.st_rdev,
            )
        )
        self.names.append(name)
        self.extents.append(list(_content(path)) if kind == stat.S_IFREG and link == row else [])
        if kind == stat.S_IFDIR:
            for each in sorted(os.listdir(os.fsencode(path))):
                self.add(os.path.join(os.fsencode(path), each), each, row)
        return row

    def _text(self, text: bytes) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def finish(self, seed: int, unit: int) -> tuple[FileTable, bytes]:
        """Return the table and the image: the extents in any order, each at a multiple of `unit`."""
        flat = [(row, *each) for row, extents in enumerate(self.extents) for each in extents]
        order = list(range(len(flat)))
        if seed >= 0:
            random.Random(seed).shuffle(order)
        places, image = {}, bytearray()
        for number in order:
            places[number] = len(image)
            image += flat[number][3]
            image += bytes(-len(image) % unit)
        extents = np.array(
            [(logical, length, places[number], -1) for number, (_row, logical, length, _data) in enumerate(flat)],
            EXTENT,
        )
        table = FileTable(
            np.array(self.rows, ENTRY),
            b"".join(self.names),
            np.cumsum([len(name) for name in self.names], dtype=np.int64),
            extents,
            np.cumsum([len(each) for each in self.extents], dtype=np.int64),
            list(self.texts),
        )
        return table, bytes(image)


class Quiet:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.done = self.total = 0

    @contextlib.contextmanager
    def task(self, _name: str, total: int) -> Iterator[Advance]:
        self.total += total
        yield self._advance

    @contextlib.contextmanager
    def count(self, _name: str) -> Iterator[Advance]:
        yield lambda _count: None

    def _advance(self, count: int) -> None:
        self.done += count


def group_of(top: Path | str, *, seed: int = 0, unit: int = UNIT) -> StoredGroup:
    """Return the group of all files below a directory, its image in memory, its table read back from its end."""
    builder = Builder()
    builder.add(os.fspath(top), b"", -1)
    table, content = builder.finish(seed, unit)
    image = content + table.to_bytes()
    record = _record(len(image), len(content), table.stored_size)
    return StoredGroup(
        record, FileTable.from_bytes(memoryview(image)[len(content) :], len(image), "test"), Memory(image)
    )


def store_group(top: Path, repository: Repository, **fields: Any) -> Snapshot:
    """Store the group of all files below a directory in a repository."""
    group = group_of(top)
    record = dataclasses.replace(group.record, unit=repository.unit(group.image.size), **fields)
    block_map = BlockMap.build(group.image.size, data=ExtentSet.whole(group.image.size))
    return repository.store(group.image, block_map, record, bases=(), advance=lambda _count: None).snapshot


def store_in(depot: Depot, top: Path) -> Snapshot:
    """Store the group of all files below a directory in a test's repository."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as opened:
        for name, text in depot.env.items():
            patch.setenv(name, text)
        repository = repository_named(plugin_manager(), depot.reference)
        opened.callback(repository.close)
        return store_group(top, repository)


def back_up(depot: Depot, top: Path) -> Snapshot:
    """Store all files below a directory, as `blockferry backup` does."""
    group = Group.parse("small", {"volume": str(top)}, "test")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in depot.env.items():
            patch.setenv(name, text)
        with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
            backups = back_up_groups(plugin_manager(), [(group, repository)], since="latest", progress=Silent())
            (done,) = backups
    assert done.problems == ()
    return done.result.snapshot


def _record(size: int, place: int, length: int) -> Record:
    return Record(
        snapshot=new_snapshot_id(),
        created=now(),
        host="host",
        volume="small",
        path="/mnt/data",
        size=size,
        block_size=512,
        filesystem="ext4",
        identity={},
        tier=Tier.USED,
        tier_reason="",
        method="files",
        stability=Stability.FROZEN,
        freeze="test",
        unit=1 << 20,
        bytes_used=size,
        bytes_changed=size,
        group={"name": "small", "table": [place, length]},
    )


def _content(path: str | bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, length, bytes) of a file's data, as its holes have it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        start, end = 0, os.fstat(descriptor).st_size
        while start < end:
            try:
                start = os.lseek(descriptor, start, os.SEEK_DATA)
            except OSError:
                return
            stop = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, stop - start, os.pread(descriptor, stop - start, start)
            start = stop
    finally:
        os.close(descriptor)


def state_of(top: Path | str) -> dict[bytes, tuple[Any, ...]]:
    """Return by path all that can be told of a tree: facts, attributes, content, holes; hard links by their paths."""
    found: dict[bytes, tuple[Any, ...]] = {}
    links: dict[int, list[bytes]] = {}
    top = os.fsencode(top)
    stack = [b""]
    while stack:
        relative = stack.pop()
        path = os.path.join(top, relative)
        facts = os.lstat(path)
        kind = stat.S_IFMT(facts.st_mode)
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        content: Any = None
        if kind == stat.S_IFREG:
            content = (facts.st_size, list(_content(path)))
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = facts.st_rdev
        elif kind == stat.S_IFDIR:
            stack += [os.path.join(relative, each) for each in os.listdir(path)]
        together = links.setdefault(facts.st_ino, [])
        together.append(relative)
        together.sort()
        found[relative] = (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime_ns, attributes, content, together)
    return found


def make_tree(top: Path) -> Path:
    """Make a tree of everything that a filesystem can hold, under names that nobody would choose."""
    deep = os.fsencode(top) + b"/caf\xe9 \xff/new\nline"
    os.makedirs(deep)
    chance = random.Random(3)
    for number, name in enumerate([b"plain", b"\xff\xfe", b"a\nb", b"\x1b[2J", b"-rf", b"back\\slash", b"n" * 255]):
        with open(os.path.join(deep, name), "wb") as file:
            file.write(chance.randbytes([1, 4096, 5000, 70_000][number % 4]))
        os.chown(os.path.join(deep, name), number, 1000 + number)
        os.chmod(os.path.join(deep, name), [0o644, 0o600, 0o4755, 0o2711, 0o000][number % 5])
    (top / "empty").touch()
    with (top / "sparse").open("wb") as file:
        for offset in (1 << 20, 5 << 20):
            file.seek(offset)
            file.write(chance.randbytes(10_000))
        file.truncate((9 << 20) + 123)
    with (top / "hole").open("wb") as file:
        file.truncate(3 << 20)
    (top / "big").write_bytes(chance.randbytes(20 << 20))
    for number in range(3):
        os.link(top / "big", top / "caf\udce9 \udcff" / f"hard{number}")
    (top / "to nothing").symlink_to("/nowhere/at all")
    os.symlink(b"caf\xe9 \xff", os.fsencode(top / "to directory"))
    os.lchown(top / "to directory", 12, 34)
    os.link(top / "to nothing", top / "to nothing again", follow_symlinks=False)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 1234))
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "socket", stat.S_IFSOCK | 0o755)
    for name in ("empty", "big"):
        os.setxattr(top / name, "user.note", chance.randbytes(300))
        os.setxattr(top / name, "trusted.blockferry", b"")
    os.setxattr(top / "empty", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.setxattr(top / "to nothing", "trusted.of.a.link", b"7", follow_symlinks=False)
    os.setxattr(top / "big", "system.posix_acl_access", acl(user=7, group=5, mask=6))
    (top / "private").mkdir()
    os.chmod(top / "private", 0o1770)
    (top / "private" / "file").write_bytes(b"secret")
    os.setxattr(top / "private", "system.posix_acl_default", acl(user=6, group=4, mask=7))
    (top / "closed").mkdir()
    (top / "closed" / "file").write_bytes(b"x")
    os.chmod(top / "closed", 0)
    for number, (directory, below, files) in enumerate(os.walk(os.fsencode(top), topdown=False)):
        for name in [*files, *below, b"."]:
            times = (0, -(10**9) - 5 if name == b"plain" else number * 10**15 + len(name))
            os.utime(os.path.join(directory, name), ns=times, follow_symlinks=False)
    return top


def acl(*, user: int, group: int, mask: int) -> bytes:
    """Return an ACL as the kernel has it (linux/posix_acl_xattr.h): owner, user 42, group, mask, others."""
    entries = [(1, 6, 0xFFFFFFFF), (2, user, 42), (4, group, 0xFFFFFFFF), (16, mask, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def table_of(*entries: dict[str, object], texts: tuple[bytes, ...] = ()) -> FileTable:
    """Return a table: of each entry its name, extents and columns."""
    rows, names, extents, ends = [], [], [], []
    for entry in ({"mode": DIRECTORY, "parent": -1, "name": b""}, *entries):
        columns = {"parent": 0, "mode": FILE, "link": -1, "text": -1, "attributes": -1, "size": 1 << 20} | entry
        rows.append(tuple(columns.get(name, 0) for name in ENTRY.names or ()))
        names.append(columns["name"])
        extents += columns.get("extents", [])
        ends.append(len(extents))
    return FileTable(
        np.array(rows, ENTRY),
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array(extents, EXTENT) if extents else np.empty(0, EXTENT),
        np.array(ends, np.int64),
        list(texts),
    )
