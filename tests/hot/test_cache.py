"""The restore cache against a model, with crashes: what was synced is there, and no block is anything it never was."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from blockferry.errors import DamagedSnapshotError, RepositoryError
from blockferry.extents import ExtentSet
from blockferry.hot import source
from blockferry.hot.activity import Activity
from blockferry.hot.attachment import Attachment
from blockferry.hot.cache import TargetCache
from blockferry.hot.hydration import Hydration
from blockferry.hot.source import Source, UnavailableError
from blockferry.hot.state import StateMap
from blockferry.hot.target import HotTarget
from blockferry.layers import BaseLayer
from blockferry.target import HEAD

BLOCK = 4096
UNIT = 16 * BLOCK
SIZE = 10 * UNIT + 3 * BLOCK + 512
ABOUT = {"snapshot": "0123456789ab", "target": "target"}
EXAMPLES, STEPS = 120, 40


class Image(BaseLayer):
    """A snapshot's image in memory, of which some extents are used. Counts what is read of each unit."""

    def __init__(self, content: bytes, extents: ExtentSet) -> None:
        self.size = len(content)
        self.extents = extents
        self.content = bytearray(len(content))
        for start, length in extents:
            self.content[start : start + length] = content[start : start + length]
        self.reads: dict[int, int] = {}
        self.failing: dict[int, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.gate.wait()
        for number in range(offset // UNIT, -(-(offset + len(buffer)) // UNIT)):
            self.reads[number] = self.reads.get(number, 0) + 1
            if number in self.failing:
                raise self.failing[number]
        buffer[:] = self.content[offset : offset + len(buffer)]


class CrashingTarget(HotTarget):
    """A target that remembers what of it is durable; a crash loses any of the rest."""

    def __init__(self, descriptor: int, *, blank: bool) -> None:
        super().__init__("target", descriptor, SIZE, head=None, block_size=512, blank=blank)
        self.descriptor = descriptor
        self.durable = os.pread(descriptor, SIZE, 0)

    def sync(self) -> None:
        self.durable = os.pread(self.descriptor, SIZE, 0)

    def crash(self, chance: random.Random) -> None:
        now = os.pread(self.descriptor, SIZE, 0)
        for place in range(0, SIZE, 512):
            kept = now if chance.random() < 0.5 else self.durable
            os.pwrite(self.descriptor, kept[place : place + 512], place)


def make_image(seed: int) -> Image:
    chance = random.Random(seed)
    pairs = [(chance.randrange(SIZE), chance.randrange(1, UNIT)) for _ in range(chance.randrange(8))]
    return Image(chance.randbytes(SIZE), ExtentSet.from_pairs(pairs).clip(0, SIZE).align(512, SIZE))


def source_of(image: Image, patience: float = 0) -> Source:
    return Source(image, lambda: image, UNIT, readers=2, patience=patience)


class Restore(RuleBasedStateMachine):
    """What each byte may be: after a write it is that; what was not synced may be lost in a crash, sector by sector."""

    @initialize(seed=st.integers(0, 10**6), blank=st.booleans(), content=st.booleans())
    def begin(self, seed: int, blank: bool, content: bool) -> None:
        self.held = contextlib.ExitStack()
        directory = Path(self.held.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        patch = self.held.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("BLOCKFERRY_STATE_DIR", str(directory / "state"))
        self.chance = random.Random(seed)
        self.image = make_image(seed)
        self.content = content
        file = directory / "target"
        file.write_bytes(bytes(SIZE) if blank else self.chance.randbytes(SIZE))
        descriptor = os.open(file, os.O_RDWR)
        self.held.callback(os.close, descriptor)
        self.target = CrashingTarget(descriptor, blank=blank)
        self.map = directory / "map"
        absent = self.image.extents if blank else ExtentSet.whole(SIZE)
        self.open(StateMap.create(self.map, SIZE, ABOUT, absent))
        self.now = bytearray(self.image.content)
        self.synced = bytes(self.now)

    def open(self, state: StateMap) -> None:
        about = Attachment("name", "borg:x", "0123456789ab", "target", SIZE, 512, SIZE)
        about.directory.mkdir(parents=True, exist_ok=True)
        self.source = source_of(self.image)
        self.cache = TargetCache(self.source, self.target, state, about, zeros_are_content=self.content)

    def teardown(self) -> None:
        if hasattr(self, "held"):
            self.check_all()
            for number in range(-(-SIZE // UNIT)):
                self.cache.fill(number, self.source.get(number))
            assert self.cache.next_missing(0) == -1
            self.cache.finish()
            self.check_all()
            on_target = os.pread(self.target.descriptor, SIZE, 0)
            for start, length in self.must_be_right():
                assert on_target[start : start + length] == self.now[start : start + length]
            assert self.cache.status()["hydrated"] == SIZE
            self.cache.close()
            self.held.close()

    def must_be_right(self) -> ExtentSet:
        return ExtentSet.whole(SIZE)

    def check_all(self) -> None:
        buffer = bytearray(SIZE)
        self.cache.read_into(0, memoryview(buffer))
        assert buffer == self.now

    @rule(start=st.integers(0, SIZE // 512 - 1), length=st.integers(1, 80))
    def write(self, start: int, length: int) -> None:
        offset = start * 512
        data = self.chance.randbytes(min(length * 512, SIZE - offset))
        self.cache.write(offset, memoryview(data))
        self.now[offset : offset + len(data)] = data

    @rule(start=st.integers(0, SIZE // 512 - 1), length=st.integers(1, 300))
    def discard(self, start: int, length: int) -> None:
        offset, count = start * 512, min(length * 512, SIZE - start * 512)
        self.cache.zero(offset, count)
        self.now[offset : offset + count] = bytes(count)

    @rule(start=st.integers(0, SIZE - 1), length=st.integers(1, 2 * UNIT))
    def read(self, start: int, length: int) -> None:
        buffer = bytearray(min(length, SIZE - start))
        self.cache.read_into(start, memoryview(buffer))
        assert buffer == self.now[start : start + len(buffer)]

    @rule(number=st.integers(0, SIZE // UNIT))
    def hydrate(self, number: int) -> None:
        self.cache.fill(number, self.source.get(number))
        assert self.cache.is_whole(number)

    @rule(first=st.integers(0, SIZE // UNIT), count=st.integers(1, 9))
    def give_back_what_nobody_used(self, first: int, count: int) -> None:
        end = first
        while end < first + count and end * UNIT < SIZE and not self.cache.is_used(end):
            end += 1
        if end > first:
            self.cache.fill_unused(first, end)
            assert all(self.cache.is_whole(number) for number in range(first, end))

    @rule()
    def sync(self) -> None:
        self.cache.sync()
        self.synced = bytes(self.now)

    @rule()
    def crash(self) -> None:
        """Lose the process, and any of what was not synced; what the kept thread had fetched may be lost, too."""
        self.cache._fetched.put(None)
        self.cache._keeper.join()
        os.close(self.cache.state._descriptor)  # as the kernel does for who dies
        self.target.crash(self.chance)
        self.target.blank = False
        self.open(StateMap.load(self.map, SIZE, ABOUT))
        found = bytearray(SIZE)
        self.cache.read_into(0, memoryview(found))
        for place in range(0, SIZE, 512):
            sector = found[place : place + 512]
            may_be = (self.synced[place : place + 512], self.now[place : place + 512])
            # A sector that was written more than once since the sync may be any of those: then it is on the disk as
            # it was last, or as it was at the sync, for this target forgets what was between.
            assert sector in may_be, place
        self.now, self.synced = found, bytes(found)
        self.target.durable = os.pread(self.target.descriptor, SIZE, 0)


def test_a_restore_never_shows_or_leaves_a_wrong_block() -> None:
    run_state_machine_as_test(
        Restore,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@dataclasses.dataclass
class Rig:
    image: Image
    target: HotTarget
    cache: TargetCache
    file: Path


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache over a target with its head kept apart, all of the image used."""
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    image = Image(random.Random(3).randbytes(SIZE), ExtentSet.whole(SIZE))
    file = tmp_path / "target"
    file.write_bytes(bytes(SIZE))
    (tmp_path / "head").write_bytes(bytes(min(HEAD, SIZE)))
    descriptor, head = os.open(file, os.O_RDWR), os.open(tmp_path / "head", os.O_RDWR)
    target = HotTarget("target", descriptor, SIZE, head=head, block_size=512, blank=True)
    about = Attachment("name", "borg:x", "0123456789ab", "target", SIZE, 512, SIZE)
    about.directory.mkdir(parents=True)
    state = StateMap.create(tmp_path / "map", SIZE, ABOUT, image.extents)
    cache = TargetCache(source_of(image, patience=30), target, state, about, zeros_are_content=False)
    yield Rig(image, target, cache, file)
    cache.close()
    os.close(descriptor)
    os.close(head)


def read(cache: TargetCache, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    cache.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_many_who_want_a_unit_at_once_have_it_fetched_once(rig: Rig) -> None:
    rig.image.gate.clear()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda offset=number * BLOCK: found.append(read(rig.cache, offset, BLOCK)))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    rig.image.gate.set()
    for thread in threads:
        thread.join()
    assert set(found) == {bytes(rig.image.content[number * BLOCK : (number + 1) * BLOCK]) for number in range(8)}
    assert rig.image.reads == {0: 1}


def test_what_is_written_while_it_is_fetched_stays(rig: Rig) -> None:
    rig.image.gate.clear()
    content: list[memoryview] = []
    fetching = threading.Thread(target=lambda: content.append(rig.cache.source.get(2)))
    fetching.start()
    rig.cache.write(2 * UNIT + BLOCK, memoryview(b"n" * BLOCK))
    rig.image.gate.set()
    fetching.join()
    rig.cache.fill(2, content[0])
    assert read(rig.cache, 2 * UNIT + BLOCK, BLOCK) == b"n" * BLOCK
    assert read(rig.cache, 2 * UNIT, BLOCK) == rig.image.content[2 * UNIT : 2 * UNIT + BLOCK]


def test_whole_blocks_are_written_without_the_repository(rig: Rig) -> None:
    rig.image.failing = dict.fromkeys(range(100), RepositoryError("gone"))
    rig.cache.write(UNIT - BLOCK, memoryview(b"w" * 3 * BLOCK))
    assert read(rig.cache, UNIT - BLOCK, 3 * BLOCK) == b"w" * 3 * BLOCK
    assert not rig.image.reads


def test_the_target_looks_like_nothing_until_all_is_there(rig: Rig) -> None:
    rig.cache.write(0, memoryview(b"superblock" + bytes(BLOCK - 10)))
    for number in range(-(-SIZE // UNIT)):
        rig.cache.fill(number, rig.cache.source.get(number))
    rig.cache.sync()
    assert rig.file.read_bytes()[: min(HEAD, SIZE)] == bytes(min(HEAD, SIZE))
    rig.cache.finish()
    assert rig.file.read_bytes() == b"superblock" + bytes(BLOCK - 10) + rig.image.content[BLOCK:]
    rig.cache.write(0, memoryview(b"afterwards" + bytes(BLOCK - 10)))
    assert rig.file.read_bytes()[:10] == b"afterwards"


def test_damage_is_told_apart_from_a_repository_that_does_not_answer(rig: Rig) -> None:
    rig.image.failing = {1: DamagedSnapshotError("the chunk is lost")}
    with pytest.raises(UnavailableError, match="the chunk is lost"):
        read(rig.cache, UNIT, BLOCK)
    assert list(rig.cache.source.damaged) == [1]
    assert read(rig.cache, 2 * UNIT, BLOCK) == rig.image.content[2 * UNIT : 2 * UNIT + BLOCK]
    with pytest.raises(UnavailableError, match="a moment ago"):
        read(rig.cache, UNIT, BLOCK)


def test_a_repository_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    image = Image(random.Random(3).randbytes(SIZE), ExtentSet.whole(SIZE))
    tries = 0

    def open_another() -> Image:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RepositoryError("no route to host")
        image.failing.clear()
        return image

    source = Source(image, open_another, UNIT, readers=2, patience=30)
    image.failing = {0: RepositoryError("connection closed")}
    assert source.get(0) == image.content[:UNIT]
    assert tries == 3
    assert source.down_since is None


def test_patience_ends(tmp_path: Path) -> None:
    image = Image(bytes(SIZE), ExtentSet.whole(SIZE))
    image.failing = {0: RepositoryError("connection closed")}

    def open_another() -> Image:
        raise RepositoryError("no route to host")

    source = Source(image, open_another, UNIT, readers=2, patience=0.2)
    with pytest.raises(UnavailableError, match="no route to host"):
        source.get(0)


def test_a_unit_that_waits_to_be_written_is_not_fetched_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_CACHE_BYTES", 0)  # four units
    writing = threading.Event()
    write = rig.target.write

    def write_slowly(offset: int, data: memoryview) -> None:
        writing.wait()
        write(offset, data)

    monkeypatch.setattr(rig.target, "write", write_slowly)
    try:
        for number in [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]:
            assert read(rig.cache, number * UNIT, BLOCK) == rig.image.content[number * UNIT : number * UNIT + BLOCK]
        assert rig.image.reads == dict.fromkeys(range(8), 1)
        assert not rig.cache.is_whole(0)
        assert rig.cache.is_coming(0)
    finally:
        writing.set()
    deadline = time.monotonic() + 20
    while any(map(rig.cache.is_coming, range(8))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(rig.cache.is_whole, range(8)))


def test_who_waits_for_the_repository_is_known_for_a_moment():
    activity = Activity()
    assert not activity.has_fetched(0.05)
    with activity.fetching():
        assert activity.has_fetched(0)
    assert activity.has_fetched(60)
    assert not activity.has_fetched(0)


def test_what_follows_a_read_in_sequence_is_fetched_before_it_is_missed(rig: Rig) -> None:
    for number in range(3):
        rig.cache.fill(number, rig.cache.source.get(number))
    hydration = Hydration(rig.cache, threads=1, rate=0)
    hydration.start()
    try:
        read(rig.cache, 2 * UNIT, BLOCK)
        time.sleep(0.2)
        assert not rig.cache.is_whole(3)
        # As the kernel cuts and mixes them up: all there are.
        for number in [0, 2, 1]:
            read(rig.cache, number * UNIT, BLOCK)
        deadline = time.monotonic() + 20
        while not hydration.complete.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert hydration.complete.is_set()
    finally:
        hydration.stop()


def test_reads_go_on_in_sequence_if_they_are_a_little_ahead():
    activity = Activity()
    assert [activity.reads_on(number) for number in [10, 11, 11, 13, 12, 16, 21, 20]] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
    ]


def test_of_what_is_wanted_the_latest_is_told_once():
    activity = Activity()
    activity.will_follow(3)
    activity.will_follow(4)
    activity.missed(9)
    assert activity.wanting.is_set()
    assert activity.take() == (4, 9)
    assert not activity.wanting.is_set()
    assert activity.take() == (-1, -1)
