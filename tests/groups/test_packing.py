"""Packing a group's files into an image, over and over, against a model that knows every byte."""

from __future__ import annotations

import dataclasses
import os
import random
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.blockmap import Kind
from blockferry.extents import ExtentSet
from blockferry.groups import packing
from blockferry.groups.content import PIECE, compare
from blockferry.groups.packing import Packed, pack
from blockferry.groups.table import BESIDE, ENTRY, FileTable
from blockferry.groups.walk import Walked
from groups_disks_support import Memory, assert_same, back_up, filesystem, reflink

BLOCK, UNIT = 4096, 16384
BLOCKS = 600


@dataclasses.dataclass
class File:
    """A file of the model: its bytes, where each piece of it lies, and whether it is as it was."""

    content: bytes
    pieces: list[tuple[int, int, int]]
    known: bool = False


class World:
    """A disk and files on it, which a test changes; and the images that were made of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.disk = bytearray(self.chance.randbytes(BLOCKS * BLOCK))
        self.files: dict[str, File] = {}
        self.free = list(range(BLOCKS))
        self.names = iter(range(1 << 30))
        self.base: FileTable | None = None
        self.order: list[str] = []
        self.image = b""
        self.stored = ExtentSet.empty()

    def add(self) -> None:
        """Add a file of a few fragments, with holes, some of it beside."""
        chance = self.chance
        size = chance.choice([1, 100, BLOCK, 3 * BLOCK + 5, UNIT - 1, UNIT, 3 * UNIT + 77, 9 * UNIT])
        beside = chance.random() < 0.2
        content, pieces, place = bytearray(size), [], 0
        while place < size:
            length = min(chance.randrange(1, 9) * BLOCK, size - place)
            count = -(-length // BLOCK)
            start = chance.choice(self.free or [0])
            run = range(start, start + count)
            if chance.random() < 0.15:
                place += count * BLOCK
                continue
            if beside:
                content[place : place + length] = chance.randbytes(length)
                pieces.append((place, BESIDE, length))
            elif all(block in self.free for block in run):
                self.free = [block for block in self.free if block not in run]
                content[place : place + length] = self.disk[start * BLOCK : start * BLOCK + length]
                pieces.append((place, start * BLOCK, length))
            place += count * BLOCK
        self.files[f"f{next(self.names)}"] = File(bytes(content), pieces)

    def share(self) -> None:
        """Have a new file share some blocks of another."""
        several = [file for file in self.files.values() if file.pieces and file.pieces[0][1] != BESIDE]
        if several:
            logical, address, length = self.chance.choice(several).pieces[0]
            length = min(length, self.chance.randrange(1, 5) * BLOCK)
            content = bytes(BLOCK) + bytes(self.disk[address : address + length])
            self.files[f"f{next(self.names)}"] = File(content, [(BLOCK, address, length)])
            assert logical % BLOCK == 0

    def change(self) -> None:
        """Remove, add and share; all others are as they were."""
        for file in self.files.values():
            file.known = True
        for name in list(self.files):
            if self.chance.random() < 0.3:
                del self.files[name]
        taken = {
            block
            for file in self.files.values()
            for _logical, address, length in file.pieces
            for block in range(address // BLOCK, -(-(address + length) // BLOCK))
            if address != BESIDE
        }
        self.free = [block for block in range(BLOCKS) if block not in taken]
        for block in self.free:
            self.disk[block * BLOCK : (block + 1) * BLOCK] = self.chance.randbytes(BLOCK)
        for _ in range(self.chance.randrange(12)):
            self.chance.choice([self.add, self.share])()

    def walked(self) -> Walked:
        """Return what a walk would find: a root and all files in it."""
        names = list(self.files)
        self.chance.shuffle(names)
        entries = np.zeros(len(names) + 1, ENTRY)
        entries["mode"], entries["parent"] = stat.S_IFREG, 0
        entries["mode"][0], entries["parent"][0] = stat.S_IFDIR, -1
        for column in ("link", "text", "attributes"):
            entries[column] = -1
        entries["size"][1:] = [len(self.files[name].content) for name in names]
        known, pieces, ends = [-1], [], [0]
        for name in names:
            file = self.files[name]
            known.append(self.order.index(name) + 1 if file.known and name in self.order else -1)
            pieces += [] if known[-1] >= 0 else [(logical, address, length) for logical, address, length in file.pieces]
            ends.append(len(pieces))
        self.order = names
        blob = [name.encode() for name in names]
        return Walked(
            entries,
            b"".join(blob),
            np.cumsum([0, *map(len, blob)]),
            [],
            np.array(pieces, PIECE),
            np.array(ends, np.int64),
            np.array(known, np.int64),
            [],
        )

    def pack(self) -> Packed:
        """Pack and store, and assert all that is promised."""
        walked = self.walked()
        packed = pack(walked, self.base, len(self.image), UNIT)
        self._assert_map(packed)
        self._assert_places(packed, walked)
        self._store(packed)
        for row, name in enumerate(self.order, 1):
            content = self.files[name].content
            made = bytearray(len(content))
            for extent in packed.table.extents_of(row):
                place, length, logical = (int(extent[column]) for column in ("place", "length", "logical"))
                made[logical : logical + length] = self.image[place : place + length]
            assert bytes(made) == content, name
        self.base = FileTable.from_bytes(packed.table.to_bytes(), len(self.image), "the model")
        return packed

    def _assert_map(self, packed: Packed) -> None:
        size = packed.block_map.size
        data, same = (packed.block_map.extents(kind).align(UNIT, size) for kind in (Kind.DATA, Kind.SAME))
        assert size % UNIT == 0
        assert not data.intersection(same), "no chunk is read and taken over"
        assert not same.difference(self.stored), "what is taken over is there"
        assert packed.late[0] % UNIT == 0
        assert packed.read.end <= packed.late[0]
        assert sum(packed.late) <= packed.table_place[0]
        assert sum(packed.table_place) <= size
        assert packed.table.stored_size < packed.table_place[1]
        ends = packed.runs["place"] + packed.runs["length"]
        assert (packed.runs["place"][1:] >= ends[:-1]).all()
        taken, live = same.total, packed.block_map.extents(Kind.SAME).total
        assert packed.wasteful == (taken - live > max(live, packing._WASTE_THAT_COUNTS))

    def _assert_places(self, packed: Packed, walked: Walked) -> None:
        """Kept files stay where they were; of all others two share a place only if they share a block."""
        for row in np.flatnonzero(walked.known >= 0).tolist():
            assert self.base is not None
            assert (packed.table.extents_of(row) == self.base.extents_of(int(walked.known[row]))).all()
        every = packed.table.extents
        order = np.argsort(every["place"], kind="stable")
        reach: tuple[int, int, int] = (0, BESIDE, 0)
        for extent in every[order]:
            place, length, address = (int(extent[column]) for column in ("place", "length", "address"))
            end, other, there = reach
            if place < end:
                assert BESIDE not in {address, other}
                assert place - address == there - other
            if place + length > end:
                reach = (place + length, address, place)

    def _store(self, packed: Packed) -> None:
        size = packed.block_map.size
        made = bytearray(size)
        for start, length in packed.block_map.extents(Kind.SAME).align(UNIT, size):
            made[start : start + length] = self.image[start : start + length]
        for run in packed.runs:
            place, length, address, row, logical = (int(run[column]) for column in packing.RUN.names or ())
            if address == BESIDE:
                made[place : place + length] = self.files[self.order[row - 1]].content[logical : logical + length]
            else:
                made[place : place + length] = self.disk[address : address + length]
        self.image = bytes(made)
        self.stored = packed.block_map.extents(Kind.DATA, Kind.SAME).align(UNIT, size)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 30))
def test_every_byte_has_its_place_through_many_backups(seed: int) -> None:
    world = World(seed)
    for _ in range(world.chance.randrange(30)):
        world.add()
    world.pack()
    for _ in range(5):
        world.change()
        world.pack()


def test_a_large_file_lies_on_chunks_of_its_own_as_it_reads() -> None:
    world = World(1)
    blocks = [30, 10, 50, 20, 0, 40]
    content = b"".join(bytes(world.disk[b * BLOCK : (b + 1) * BLOCK]) for b in blocks)
    pieces = [(number * BLOCK, block * BLOCK, BLOCK) for number, block in enumerate(blocks)]
    world.files = {
        "large": File(content, pieces),
        "small": File(bytes(world.disk[-5 * BLOCK :][:99]), [(0, 595 * BLOCK, 99)]),
    }
    packed = world.pack()
    extents = packed.table.extents_of(world.order.index("large") + 1)
    assert extents["place"][0] % UNIT == 0
    assert (np.diff(extents["place"]) == BLOCK).all()


def test_much_that_is_not_in_use_has_the_next_backup_pack_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_WASTE_THAT_COUNTS", UNIT)
    world = World(2)
    for number in range(40):
        place = number * BLOCK
        world.files[f"f{number:02}"] = File(bytes(world.disk[place : place + BLOCK]), [(0, place, BLOCK)])
    assert not world.pack().wasteful
    for number in range(40):
        world.files[f"f{number:02}"].known = True
        if number % 8:
            del world.files[f"f{number:02}"]
    assert world.pack().wasteful


@pytest.mark.root
def test_a_wasteful_snapshot_is_followed_by_one_that_wastes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_WASTE_THAT_COUNTS", 100_000)
    with filesystem("ext4", tmp_path) as top:
        for number in range(200):
            (top / f"f{number}").write_bytes(os.urandom(9000))
        time.sleep(0.1)  # what changed just now is read once more
        repository = Memory()
        sizes = []
        for change in range(3):
            result = back_up(top, repository)
            assert_same(repository, result, top)
            sizes.append(result.result.record)
            if change == 0:
                for number in range(200):
                    if number % 8:
                        (top / f"f{number}").unlink()
        assert sizes[1].base
        assert sizes[1].group["wasteful"]
        assert sizes[2].base is None
        assert "packed anew" in sizes[2].tier_reason
        assert sizes[2].size < sizes[1].size


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs"])
def test_what_files_share_is_stored_once(kind: str, tmp_path: Path) -> None:
    with filesystem(kind, tmp_path) as top:
        (top / "one").write_bytes(os.urandom(1 << 20))
        for number in range(10):
            reflink(top / "one", top / f"copy{number}")
        with (top / "copy3").open("r+b") as file:
            file.seek(500_000)
            file.write(b"of its own")
        repository = Memory()
        result = back_up(top, repository)
        assert_same(repository, result, top)
        assert result.result.bytes_read < 1.2 * (1 << 20)


def piece(*pieces: tuple[int, int, int]) -> bytes:
    return np.array(list(pieces), PIECE).tobytes()


@pytest.mark.parametrize(
    ("then", "now", "same_bytes", "same_places"),
    [
        ([(0, 4096, 8192)], [(0, 4096, 4096), (4096, 8192, 4096)], True, True),
        ([(0, 4096, 8192)], [(0, 4096, 4096), (4096, 0, 4096)], True, False),
        ([(0, 4096, 8192)], [(0, 4096, 12288)], False, True),
        ([(0, 4096, 8192)], [(0, 4096, 4096)], False, False),
        ([(0, BESIDE, 5000)], [(0, 1 << 20, 5000)], True, True),
        ([(0, BESIDE, 5000)], [(0, 1 << 20, 4096)], False, True),
        ([(0, 4096, 4096), (4096, BESIDE, 10)], [(0, 4096, 4106)], True, True),
        ([(0, 4096, 4096)], [(0, BESIDE, 4096)], True, False),
        ([], [(0, 4096, 1)], False, True),
        ([(8192, 4096, 1)], [], False, False),
    ],
)
def test_pieces_that_were_found_twice_are_compared(
    then: list[tuple[int, int, int]], now: list[tuple[int, int, int]], same_bytes: bool, same_places: bool
) -> None:
    assert compare(piece(*then), piece(*now)) == (same_bytes, same_places)


def test_the_model_itself_has_files_that_share_and_lie_beside() -> None:
    def every() -> Iterator[int]:
        world = World(3)
        for _ in range(30):
            world.add()
            world.share()
        for file in world.files.values():
            yield from (address for _logical, address, _length in file.pieces)

    addresses = list(every())
    assert BESIDE in addresses
    assert len(set(addresses)) < len(addresses)
