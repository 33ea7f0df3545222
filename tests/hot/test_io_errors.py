"""Every write and sync of the target and of its map fails once: nothing that was acknowledged is lost, nothing wrong.

The Nth call fails, for every N of a small scenario, and with it what a kernel then does: of what was written and not
yet durable, any sector may be lost. After a failed sync that is so although later ones say that all is well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry import kernel
from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry.hot.attachment import Attachment
from blockferry.hot.cache import TargetCache
from blockferry.hot.source import Source
from blockferry.hot.state import StateMap
from blockferry.hot.target import HotTarget
from blockferry.layers import BaseLayer

BLOCK = 4096
UNIT = 16 * BLOCK
SIZE = 6 * UNIT + 3 * BLOCK
ABOUT = {"snapshot": "0123456789ab", "target": "target"}
IMAGE = random.Random(3).randbytes(SIZE)


class Image(BaseLayer):
    size, extents = SIZE, ExtentSet.whole(SIZE)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = IMAGE[offset : offset + len(buffer)]


@dataclasses.dataclass
class Disk:
    """Files whose writes are durable once they are synced, and of which the Nth call fails."""

    fails_at: int
    number: int
    calls: int = 0
    durable: dict[int, bytes] = dataclasses.field(default_factory=dict)
    chance: random.Random = dataclasses.field(default_factory=lambda: random.Random(1))

    def count(self, descriptor: int) -> None:
        self.durable.setdefault(descriptor, os.pread(descriptor, 1 << 24, 0))
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(self.number, os.strerror(self.number))

    def lose(self, descriptor: int) -> None:
        """Lose any of the sectors that are not durable."""
        before, now = self.durable[descriptor], os.pread(descriptor, 1 << 24, 0)
        for place in range(0, len(before), 512):
            if self.chance.random() < 0.5:
                WRITE(descriptor, before[place : place + 512], place)
        self.durable[descriptor] = os.pread(descriptor, 1 << 24, 0)
        assert len(now) == len(before)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.count(descriptor)
        return WRITE(descriptor, data, offset)

    def fdatasync(self, descriptor: int) -> None:
        try:
            self.count(descriptor)
        except OSError:
            self.lose(descriptor)
            raise
        self.durable[descriptor] = os.pread(descriptor, 1 << 24, 0)

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        self.count(descriptor)
        FALLOCATE(descriptor, mode, offset, length)


WRITE, FALLOCATE = os.pwrite, kernel.fallocate


class Scenario:
    """A restore, what each sector of it may be, and what was acknowledged."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = home / "target"
        self.file.write_bytes(bytes(SIZE))
        (home / "head").write_bytes(bytes(UNIT))
        self.may_be: list[set[bytes]] = [{IMAGE[place : place + 512]} for place in range(0, SIZE, 512)]
        self.acknowledged = 0
        StateMap.create(home / "map", SIZE, ABOUT, ExtentSet.whole(SIZE)).close()

    @contextlib.contextmanager
    def opened(self, *, blank: bool) -> Iterator[TargetCache]:
        descriptors = [os.open(self.home / name, os.O_RDWR) for name in ("target", "head")]
        target = HotTarget("target", descriptors[0], SIZE, head=descriptors[1], block_size=512, blank=blank)
        about = Attachment("name", "borg:x", ABOUT["snapshot"], "target", SIZE, 512, SIZE)
        about.directory.mkdir(parents=True, exist_ok=True)
        source = Source(Image(), Image, UNIT, readers=2, patience=0)
        state = StateMap.load(self.home / "map", SIZE, ABOUT)
        cache = TargetCache(source, target, state, about, zeros_are_content=True)
        try:
            yield cache
        finally:
            cache._fetched.put(None)
            cache._keeper.join()
            state.close()
            for descriptor in descriptors:
                os.close(descriptor)

    def write(self, cache: TargetCache, offset: int, data: bytes | None, length: int = 0) -> None:
        new = data if data is not None else bytes(length)
        for place in range(0, len(new), 512):
            self.may_be[(offset + place) // 512].add(new[place : place + 512])
        with contextlib.suppress(BlockferryError):
            if data is None:
                cache.zero(offset, length)
            else:
                cache.write(offset, memoryview(data))
            self.pending += [(offset, new)]

    def sync(self, cache: TargetCache) -> None:
        with contextlib.suppress(BlockferryError):
            cache.sync()
            for offset, new in self.pending:
                for place in range(0, len(new), 512):
                    self.may_be[(offset + place) // 512] = {new[place : place + 512]}
            self.acknowledged += 1
            self.pending = []

    def run(self, cache: TargetCache) -> None:
        """Write whole and torn blocks, discard, hydrate, sync: before, between and after."""
        self.pending: list[tuple[int, bytes]] = []
        chance = random.Random(8)
        for number in range(3):
            self.write(cache, number * UNIT + 512, chance.randbytes(1024))
            self.write(cache, number * UNIT + 5 * BLOCK, chance.randbytes(2 * BLOCK))
            self.write(cache, (number + 1) * UNIT - 1024, None, 3 * BLOCK)
            self.sync(cache)
            with contextlib.suppress(BlockferryError):
                cache.fill(number, cache.source.get(number))
            self.write(cache, number * UNIT + 9 * BLOCK, chance.randbytes(512))
            self.sync(cache)
        with contextlib.suppress(BlockferryError):
            for number in range(7):
                cache.fill(number, cache.source.get(number))
        self.sync(cache)

    def check(self, cache: TargetCache) -> None:
        found = bytearray(SIZE)
        cache.read_into(0, memoryview(found))
        for place, may_be in enumerate(self.may_be):
            assert bytes(found[place * 512 : (place + 1) * 512]) in may_be, place


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep only the first unit apart, as the head."""
    monkeypatch.setattr("blockferry.hot.target.HEAD", UNIT)
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))


def play(scenario: Scenario, disk: Disk) -> None:
    """Play the scenario on a disk that fails, lose power, and look at what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", disk.pwrite)
        patch.setattr(os, "fdatasync", disk.fdatasync)
        patch.setattr(kernel, "fallocate", disk.fallocate)
        with scenario.opened(blank=True) as cache:
            scenario.run(cache)
            patch.undo()
            for descriptor in disk.durable:
                disk.lose(descriptor)
    with scenario.opened(blank=False) as cache:
        scenario.check(cache)
        for number in range(7):
            cache.fill(number, cache.source.get(number))
        scenario.check(cache)
        assert cache.next_missing(0) == -1


def calls_in_all(tmp_path: Path) -> int:
    disk = Disk(0, errno.EIO)
    (tmp_path / "count").mkdir()
    scenario = Scenario(tmp_path / "count")
    play(scenario, disk)
    assert scenario.acknowledged == 7
    return disk.calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_whichever_call_fails_nothing_acknowledged_is_lost(tmp_path: Path, number: int) -> None:
    total = calls_in_all(tmp_path)
    assert total > 60
    for at in range(1, total + 1):
        (tmp_path / str(at)).mkdir()
        play(Scenario(tmp_path / str(at)), Disk(at, number))


def test_after_a_failed_sync_none_succeeds_and_the_status_says_so(tmp_path: Path) -> None:
    scenario = Scenario(tmp_path)
    with scenario.opened(blank=True) as cache:
        cache.write(0, memoryview(b"x" * BLOCK))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fdatasync", Disk(1, errno.EIO).fdatasync)
            with pytest.raises(BlockferryError, match="Input/output"):
                cache.sync()
        with pytest.raises(BlockferryError, match="Input/output"):
            cache.sync()
        assert "Input/output" in cache.status()["failure"]
