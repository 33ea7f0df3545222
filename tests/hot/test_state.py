"""The map of which blocks are there: what it holds, what of it is durable, and in which order."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry.hot.state import PAGE, StateMap, block_size_for, runs

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
ABOUT = {"snapshot": "0123456789ab", "target": "/dev/sdz"}


def nothing() -> None:
    """The target is always durable."""


@pytest.mark.parametrize(
    ("size", "block"),
    [(1, 4096), (TIB, 4096), (TIB + 1, 8192), (16 * TIB, 65536), (16 * TIB + 1, 131072)],
)
def test_a_map_has_at_most_2_to_the_28_bits(size: int, block: int) -> None:
    assert block_size_for(size) == block
    assert -(-size // block) <= 1 << 28


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_those_of_the_bits(seed: int) -> None:
    chance = random.Random(seed)
    bits = [chance.random() < 0.5 for _ in range(chance.randrange(1, 300))]
    mask = sum(bit << place for place, bit in enumerate(bits))
    shown = [value for first, end, value in runs(mask, len(bits)) for _ in range(first, end)]
    assert shown == bits
    assert all(first < end for first, end, _value in runs(mask, len(bits)))


@pytest.mark.parametrize("size", [MIB, 3 * MIB + 5000, 300 * MIB + 1])
def test_what_is_absent_is_what_was_said_and_a_reload_says_the_same(tmp_path: Path, size: int) -> None:
    chance = random.Random(size)
    pairs = [(chance.randrange(size), chance.randrange(1, 200 * KIB)) for _ in range(20)]
    absent = ExtentSet.from_pairs(pairs).clip(0, size)
    state = StateMap.create(tmp_path / "map", size, ABOUT, absent)
    count = -(-size // 4096)
    expected = {number for start, length in absent for number in range(start // 4096, -(-(start + length) // 4096))}
    assert {number for number in range(count) if not state.present.all(number, number + 1)} == expected
    assert state.present.count - state.present.total == len(expected)
    assert state.dirty.total == 0
    state.present.set(0, 3)
    state.dirty.set(count - 1, count)
    state.sync(nothing)
    state.close()
    again = StateMap.load(tmp_path / "map", size, ABOUT)
    assert again.present.content == state.present.content
    assert (again.present.total, again.dirty.total) == (state.present.total, 1)
    again.close()


def test_a_unit_is_whole_when_all_its_blocks_are_there(tmp_path: Path) -> None:
    size = 5 * MIB + 4096
    state = StateMap.create(tmp_path / "map", size, ABOUT, ExtentSet.from_pairs([(MIB + 5, 1), (5 * MIB, 4096)]))
    assert list(state.whole(MIB)) == [1, 0, 1, 1, 1, 0]
    state.present.set(256, 257)
    assert list(state.whole(MIB)) == [1, 1, 1, 1, 1, 0]
    state.close()


def test_the_target_is_durable_before_the_map_says_so(tmp_path: Path) -> None:
    state = StateMap.create(tmp_path / "map", MIB, ABOUT, ExtentSet.whole(MIB))
    before = (tmp_path / "map").read_bytes()
    state.present.set(7, 9)

    def target_is_made_durable() -> None:
        assert (tmp_path / "map").read_bytes() == before
        state.present.set(20, 21)  # written while the target was being synced: not durable yet

    state.sync(target_is_made_durable)
    state.close()
    stored = StateMap.load(tmp_path / "map", MIB, ABOUT)
    assert stored.present.all(7, 9)
    assert not stored.present.all(20, 21)
    stored.close()


def test_what_could_not_be_synced_is_synced_the_next_time(tmp_path: Path) -> None:
    state = StateMap.create(tmp_path / "map", MIB, ABOUT, ExtentSet.whole(MIB))
    state.present.set(7, 9)

    def fails() -> None:
        raise BlockferryError("no")

    with pytest.raises(BlockferryError):
        state.sync(fails)
    assert (tmp_path / "map").read_bytes()[PAGE] == 0
    state.sync(nothing)
    assert (tmp_path / "map").read_bytes()[PAGE] == 0x80
    state.close()


def test_many_who_sync_at_once_share_and_nobody_returns_before_his_own_is_durable(tmp_path: Path) -> None:
    state = StateMap.create(tmp_path / "map", 256 * MIB, ABOUT, ExtentSet.whole(256 * MIB))
    synced = 0

    def count() -> None:
        nonlocal synced
        synced += 1
        time.sleep(0.001)  # nobody shares what takes no time, as on a tmpfs

    def work(worker: int) -> None:
        for number in range(200):
            block = worker * 1000 + number
            state.present.set(block, block + 1)
            state.sync(count)
            stored = (tmp_path / "map").read_bytes()
            assert stored[PAGE + block // 8] >> block % 8 & 1

    failures: list[BaseException] = []

    def guarded(worker: int) -> None:
        try:
            work(worker)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=[worker]) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert synced < 1600
    state.close()


@pytest.mark.parametrize("damage", ["another snapshot", "cut short", "another size"])
def test_a_map_of_something_else_is_refused(tmp_path: Path, damage: str) -> None:
    StateMap.create(tmp_path / "map", MIB, ABOUT, ExtentSet.whole(MIB)).close()
    about, size = ABOUT, MIB
    if damage == "another snapshot":
        about = ABOUT | {"snapshot": "f" * 12}
    elif damage == "another size":
        size = 2 * MIB
    else:
        (tmp_path / "map").write_bytes((tmp_path / "map").read_bytes()[:-1])
    with pytest.raises(BlockferryError, match="not the map of this restore"):
        StateMap.load(tmp_path / "map", size, about)
