"""The image of a group, read by a repository in whatever order: what comes last waits for the rest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.blockmap import BlockMap
from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.groups import image as image_module
from blockferry.groups.image import GroupImage
from blockferry.groups.packing import RUN, Packed
from blockferry.groups.table import BESIDE, FileTable
from blockferry.layers import CutLayer
from borg_support import Volume

UNIT = 16384
DISK = np.frombuffer(random.Random(5).randbytes(40 * UNIT), np.uint8)
RUNS = [
    # place, length, address, row, logical
    (0, 5000, 100_000, -1, 0),
    (5000, 123, 105_500, -1, 0),
    (5123, 3000, BESIDE, 7, 20),
    (UNIT, 2 * UNIT + 100, 0, 3, 0),
    (3 * UNIT + 4096, 50, 300_000, 3, 2 * UNIT + 4096),
    (5 * UNIT, 4096, 200_000, 4, 0),
]
SAME = ExtentSet.from_pairs([(4 * UNIT, UNIT)])
LATE, TABLE = (6 * UNIT, UNIT), (7 * UNIT, 3000)
SIZE = 20 * UNIT


class File:
    """What is read of row 7, and the end that is made once."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.sealed = 0
        self.before_seal: Callable[[], None] = lambda: None

    def read_into(self, row: int, offset: int, buffer: memoryview) -> None:
        assert row == 7
        self.read.append(offset)
        buffer[:] = bytes((offset + place) % 251 for place in range(len(buffer)))

    def seal(self) -> dict[int, bytes]:
        self.before_seal()
        self.sealed += 1
        return {LATE[0]: b"late" * 10, TABLE[0]: b"the table" * 20}


def packed_image() -> Packed:
    runs = np.array(RUNS, RUN)
    read = ExtentSet.from_ranges(runs["place"], runs["place"] + runs["length"])
    whole = read.union(ExtentSet.from_pairs([LATE, TABLE]))
    empty = FileTable(np.empty(0), b"", np.empty(0), np.empty(0), np.empty(0), [])
    return Packed(empty, runs, BlockMap.build(SIZE, data=whole, same=SAME), read, LATE, TABLE, False)


def make(file: File, disk: Volume | None = None) -> GroupImage:
    return GroupImage(packed_image(), UNIT, disk or Volume(DISK), file.read_into, file.seal, lambda _place: None)


def expected() -> bytes:
    made = bytearray(SIZE)
    for place, length, address, _row, logical in RUNS:
        plain = bytes((logical + i) % 251 for i in range(length))
        made[place : place + length] = plain if address == BESIDE else DISK[address : address + length].tobytes()
    for place, content in File().seal().items():
        made[place : place + len(content)] = content
    return bytes(made)


EXPECTED = expected()
CHUNKS = [
    place for start, length in make(File()).extents.align(UNIT, SIZE) for place in range(start, start + length, UNIT)
]


def read(image: GroupImage, offset: int, length: int) -> None:
    """Read over noise, and assert that it is what belongs there."""
    buffer = bytearray(b"?" * length)
    image.read_into(offset, memoryview(buffer))
    assert bytes(buffer) == EXPECTED[offset : offset + length], (offset, length)


def test_one_read_of_everything_has_the_end_too() -> None:
    file = File()
    read(make(file), 0, SIZE)
    assert file.sealed == 1


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from([UNIT, 8192, 4096, 3 * UNIT, 1000]))
def test_chunks_may_be_read_in_any_order_from_threads_and_twice(chance: random.Random, piece: int) -> None:
    file = File()
    image = make(file)
    wanted = [(place, min(piece, SIZE - place)) for place in range(0, SIZE, piece)]
    wanted += chance.sample(wanted, 3)
    chance.shuffle(wanted)
    waits = sum(offset + length > LATE[0] for offset, length in wanted)
    with ThreadPoolExecutor(waits + 2) as pool:
        for done in [pool.submit(read, image, *each) for each in wanted]:
            done.result(20)
    assert file.sealed == 1


def test_a_reader_that_asks_only_for_the_data_is_not_kept_waiting() -> None:
    file = File()
    cut = CutLayer(make(file), make(file).extents, gap=100)
    for place in range(0, SIZE, 8192):
        buffer = bytearray(8192)
        cut.read_into(place, memoryview(buffer))
        assert bytes(buffer) == EXPECTED[place : place + 8192]
    assert file.sealed == 1


def test_chunks_that_have_nothing_to_be_read_do_not_stand_in_for_others() -> None:
    file = File()
    image = make(file)
    for _ in range(3):
        read(image, 4 * UNIT, UNIT)
        read(image, 2 * UNIT, UNIT)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(read, image, LATE[0], UNIT)
        for place in (0, UNIT, 3 * UNIT):
            read(image, place, UNIT)
            assert not file.sealed
        assert not end.done()
        read(image, 5 * UNIT, UNIT)
        end.result(20)


def test_whoever_waits_for_the_end_fails_with_the_rest() -> None:
    disk = Volume(DISK, fails_at=250_000)
    image = make(File(), disk)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(read, image, TABLE[0], 100)
        with pytest.raises(OSError, match="broken"):
            read(image, 3 * UNIT, UNIT)
        with pytest.raises(OSError, match="broken"):
            end.result(20)


def test_an_end_that_cannot_be_made_fails_every_time() -> None:
    file = File()

    def fail() -> None:
        raise VolumeError("no")

    file.before_seal = fail
    image = make(file)
    for place in CHUNKS:
        if place < LATE[0]:
            read(image, place, UNIT)
    for _ in range(2):
        with pytest.raises(VolumeError, match="no"):
            read(image, LATE[0], UNIT)


def test_a_repository_that_never_reads_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_STALLED", 0.2)
    image = make(File())
    read(image, 0, UNIT)
    with pytest.raises(VolumeError, match="not read"):
        read(image, LATE[0], UNIT)


def test_the_end_is_made_when_the_last_read_is_over_and_not_before() -> None:
    """A read that is still under way has not been looked at: its file could change behind our back."""
    file, release, entered = File(), threading.Event(), threading.Event()
    plain = file.read_into

    def slow(row: int, offset: int, buffer: memoryview) -> None:
        entered.set()
        assert release.wait(20)
        plain(row, offset, buffer)

    image = GroupImage(packed_image(), UNIT, Volume(DISK), slow, file.seal, lambda _place: None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, image, 0, UNIT)
        assert entered.wait(20)
        end = pool.submit(read, image, LATE[0], UNIT)
        for place in (UNIT, 2 * UNIT, 3 * UNIT, 5 * UNIT):
            read(image, place, UNIT)
        assert not file.sealed
        release.set()
        first.result(20)
        end.result(20)


def test_whoever_waits_for_the_end_is_told_that_it_will_not_come() -> None:
    image = make(File())
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(read, image, LATE[0], UNIT)
        image.give_up(VolumeError("nobody reads on"))
        with pytest.raises(VolumeError, match="nobody reads on"):
            end.result(20)
