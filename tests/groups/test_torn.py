"""Files that change while they are backed up: what is stored was theirs at one instant, or is said not to be.

Every file says of each of its cells whose it is, of which generation, and where in it. Writers keep at it on a disk so
small that what one file frees is another's at once. BLOCKFERRY_TEST_TORN=N does N rounds on each filesystem.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blockferry.groups import backup as backup_module
from blockferry.groups import second_look
from blockferry.groups.image import GroupImage
from blockferry.groups.table import CHANGED, GONE, UNREADABLE
from groups_disks_support import Memory, assert_same, back_up, contents, filesystem, opened

pytestmark = [pytest.mark.root, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_TORN", "3"))
CELL = 64
LOOKS = re.compile(rb"(\S{8}) generation (\d{8}) cell (\d{8}) ")


def label(name: str) -> str:
    return name.ljust(8, "_")


def cells(name: str, generation: int, count: int, first: int = 0) -> bytes:
    head = f"{label(name)} generation {generation:08d} cell "
    return b"".join((head + f"{number:08d} ").encode().ljust(CELL, b".") for number in range(first, first + count))


class Writer:
    """Files of all kinds, and what goes on with them. Runs in a process of its own."""

    def __init__(self, top: Path, seed: int) -> None:
        self.top = top
        self.chance = random.Random(seed)
        self.generation = 0
        self.kinds: list[Callable[[str], None]] = [
            self.overwrite,
            self.truncate,
            self.replace,
            self.append,
            self.through_memory,
            self.delete,
            self.links,
            self.move,
            self.direct,
        ]

    def run(self) -> None:
        while True:
            self.generation += 1
            # A few are busy, and most rest most of the time.
            number = self.chance.choice([0, 0, 1, self.chance.randrange(16)])
            kind = self.chance.choice(self.kinds)
            with contextlib.suppress(OSError):  # the disk is full
                kind(f"{kind.__name__[0:3]}{number}")
            if self.chance.random() < 0.3:
                time.sleep(self.chance.random() / 100)

    def many(self) -> int:
        return self.chance.choice([1, 60, 64, 200, 1500])

    def make(self, name: str, count: int) -> None:
        path = self.top / name
        with open(path, "wb", buffering=0) as file:
            file.write(cells(name, self.generation, count))

    def overwrite(self, name: str) -> None:
        """Always as large, written in one go."""
        count = 300 + int(name[3:]) * 20
        path = self.top / name
        if not path.exists():
            path = self.top / f".{name}"
            path.write_bytes(cells(name, self.generation, count))
            path.rename(self.top / name)
            return
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, cells(name, self.generation, count), 0)
        os.close(descriptor)

    def truncate(self, name: str) -> None:
        self.make(name, self.many())

    def replace(self, name: str) -> None:
        path = self.top / f".{name}"
        path.write_bytes(cells(name, self.generation, self.many()))
        path.rename(self.top / name)

    def append(self, name: str) -> None:
        path = self.top / name
        size = path.stat().st_size if path.exists() else 0
        if size > 200_000:
            path.unlink()
            size = 0
        with open(path, "ab", buffering=0) as file:
            file.write(cells(name, 0, self.many() // 10 + 1, size // CELL))

    def through_memory(self, name: str) -> None:
        count = 256 + int(name[3:]) * 64
        path = self.top / name
        if not path.exists():
            hidden = self.top / f".{name}"
            hidden.write_bytes(cells(name, self.generation, count))
            hidden.rename(path)
            return
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), count * CELL) as mapped:
            for again in range(2):
                plain = cells(name, self.generation + again * 50_000_000, count)
                for place in range(0, len(plain), 4096):
                    mapped[place : place + 4096] = plain[place : place + 4096]
                time.sleep(self.chance.random() / 50)

    def delete(self, name: str) -> None:
        (self.top / name).unlink(missing_ok=True)
        self.make(name, self.many())

    def links(self, name: str) -> None:
        """Two names of a file, of which one is sometimes another's."""
        first, second = self.top / f"{name}a", self.top / f"{name}b"
        match self.chance.randrange(4):
            case 0:
                hidden = self.top / f".{name}"
                hidden.write_bytes(cells(name, self.generation, 100))
                hidden.rename(self.chance.choice([first, second]))
            case 1:
                first.unlink(missing_ok=True)
                os.link(second, first)
            case 2:
                second.unlink(missing_ok=True)
                os.link(first, second)
            case 3:
                descriptor = os.open(first, os.O_WRONLY)
                os.pwrite(descriptor, cells(name, self.generation, 100), 0)
                os.close(descriptor)

    def move(self, name: str) -> None:
        here, there = self.top / name, self.top / f"{name}x"
        if here.exists():
            here.rename(there)
        elif there.exists():
            there.rename(here)
        else:
            (self.top / f".{name}").write_bytes(cells(name, self.generation, self.many()))
            (self.top / f".{name}").rename(here)

    def direct(self, name: str) -> None:
        """Past the page cache, in one go."""
        count = 64 * 8
        with contextlib.closing(mmap.mmap(-1, count * CELL)) as buffer:
            buffer[:] = cells(name, self.generation, count)
            path = self.top / name
            if not path.exists():
                path.write_bytes(buffer[:])
            descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
            os.pwrite(descriptor, buffer, 0)
            os.close(descriptor)


def verdict(name: str, content: bytes) -> str:
    """Return what is wrong with a file's content; "" if it was its content at an instant."""
    name = name.lstrip(".")
    kind, number = re.match(r"([a-z]{3}\d+)", name)[1], len(content) // CELL  # type: ignore[index]
    if kind.startswith(("tru", "del", "app")) or name.startswith("."):
        pass  # it may be as long as it has got
    elif len(content) % CELL:
        return "cut off"
    found = []
    for place in range(0, number * CELL, CELL):
        match = LOOKS.match(content, place)
        if not match or match[1].decode() != label(kind) or int(match[3]) * CELL != place:
            return f"cell {place // CELL} is {content[place : place + CELL]!r}"
        found.append(int(match[2]))
    turns = sum(one != other for one, other in itertools.pairwise(found))
    allowed = 1 if kind.startswith("thr") else 0
    return f"{turns + 1} generations: {sorted(set(found))}" if turns > allowed else ""


@contextlib.contextmanager
def written_to(top: Path, seed: int, processes: int = 2) -> Iterator[None]:
    """Have processes write while the context lasts."""
    children = []
    for number in range(processes):
        place = top / f"writer-{number}"
        place.mkdir(exist_ok=True)
        child = os.fork()
        if not child:
            try:
                Writer(place, seed + number).run()
            finally:
                os._exit(1)
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that take their time, and a pause behind the walk: writers get in between."""
    chance, read, wait = random.Random(3), GroupImage.read_into, backup_module.wait_out

    def read_slowly(image: GroupImage, offset: int, buffer: memoryview) -> None:
        time.sleep(chance.random() / 100)
        read(image, offset, buffer)

    def wait_longer(times: np.ndarray) -> None:
        time.sleep(chance.random() / 30)
        wait(times)

    monkeypatch.setattr(GroupImage, "read_into", read_slowly)
    monkeypatch.setattr(backup_module, "wait_out", wait_longer)
    monkeypatch.setattr(second_look, "_PATIENCE", 0.5)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ext4-seconds"])
def test_no_file_is_stored_as_it_never_was(kind: str, tmp_path: Path, slow: None) -> None:
    with filesystem(kind, tmp_path, {"ext4": 20 << 20, "ext4-seconds": 20 << 20}.get(kind, 0)) as top:
        (top / "rests").mkdir()
        for number in range(100):
            (top / "rests" / f"res{number}").write_bytes(cells(f"res{number}", 0, number * 3))
        repository = Memory(1 << 20)
        flagged = {CHANGED: 0, UNREADABLE: 0, GONE: 0}
        whole = 0
        with written_to(top, 1):
            time.sleep(0.3)
            for _ in range(ROUNDS):
                result = back_up(top, repository)
                group = opened(repository, result)
                reported = {path for path, _why in result.problems}
                for row, (path, content) in enumerate(zip(group.table.paths(), contents(group), strict=True)):
                    entry = group.table.entries[row]
                    flags = int(entry["flags"])
                    for flag in flagged:
                        flagged[flag] += bool(flags & flag)
                    if flags & (CHANGED | UNREADABLE):
                        assert os.path.join(os.fsencode(top), path) in reported
                    if entry["mode"] & 0o170000 != 0o100000 or flags:
                        continue
                    assert not (why := verdict(path.decode().split("/")[-1], content)), (path, why, entry)
                    whole += 1
                for name in list(repository.archives)[:-3]:
                    del repository.archives[name]
        sys.stdout.write(f"{kind}: {ROUNDS} rounds, {whole} files whole, flagged: {flagged}\n")
        assert whole > ROUNDS * 100
        time.sleep(0.1)
        for _ in range(2):
            assert_same(repository, back_up(top, repository), top)
