"""The buffer of a restore without a target: never a wrong byte, never more than its size, a unit fetched once."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.errors import BlockferryError, DamagedSnapshotError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import CacheOptions
from blockferry.hot import attachment, buffer
from blockferry.hot.attachment import Attachment
from blockferry.hot.buffer import BufferCache, blockferry_restore_cache
from blockferry.hot.source import Source
from blockferry.layers import BaseLayer
from commands_support import Depot, Done, blockferry, new_depot, run

UNIT = 64 << 10
UNITS = 24
SIZE = UNITS * UNIT - 4096 + 512
SLOTS = 6
SECONDS = float(os.environ.get("BLOCKFERRY_TEST_SECONDS", "4"))


class Image(BaseLayer):
    """A snapshot's image in memory, of which the unit 5 is not used. Counts what is read of each unit."""

    def __init__(self) -> None:
        self.size = SIZE
        self.extents = ExtentSet.whole(SIZE).difference(ExtentSet.from_pairs([(5 * UNIT, UNIT)]))
        self.content = bytearray(random.Random(4).randbytes(SIZE))
        self.content[5 * UNIT : 6 * UNIT] = bytes(UNIT)
        self.reads: list[int] = []
        self.failing: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def read_into(self, offset: int, into: memoryview) -> None:
        self.gate.wait()
        self.reads.append(offset // UNIT)
        if offset // UNIT in self.failing:
            raise DamagedSnapshotError("the chunk is lost")
        into[:] = self.content[offset : offset + len(into)]


class Forgetful(Source):
    """A source that keeps nothing in memory: what is read twice shows."""

    def _drop_oldest(self) -> None:
        with self._state:
            for number in [each for each, future in self._units.items() if future.done()]:
                del self._units[number]


@pytest.fixture
def image() -> Image:
    return Image()


def source_of(image: Image) -> Source:
    return Forgetful(image, lambda: image, UNIT, readers=4, patience=0, shared=True)


@pytest.fixture
def cache(image: Image, tmp_path: Path) -> Iterator[BufferCache]:
    with tempfile.TemporaryFile(dir=tmp_path, buffering=0) as file:
        yield BufferCache(source_of(image), file.fileno(), SLOTS, directory=str(tmp_path))


def read(cache: BufferCache, offset: int, length: int) -> bytes:
    into = bytearray(b"?" * length)
    cache.read_into(offset, memoryview(into))
    return bytes(into)


def options(directory: Path, size: int) -> CacheOptions:
    return CacheOptions(
        name="name",
        repository="borg:x",
        snapshot="0123456789ab",
        target="",
        block_size=512,
        zeros_are_content=False,
        buffer=str(directory),
        buffer_size=size,
    )


def test_a_unit_is_fetched_again_only_after_others_drove_it_out(cache: BufferCache, image: Image) -> None:
    for number in range(SLOTS - 1):
        read(cache, number * UNIT, 100)
    assert read(cache, 0, 5 * UNIT) == image.content[: 5 * UNIT]
    assert image.reads == [0, 1, 2, 3, 4]
    read(cache, 0, 1)  # 1 is now the one that nobody has read for longest
    read(cache, 6 * UNIT, 1)
    read(cache, 7 * UNIT, 1)
    image.reads.clear()
    for number in (0, 2, 3, 4, 6, 7):
        assert read(cache, number * UNIT + 3, 9) == image.content[number * UNIT + 3 : number * UNIT + 12]
    assert not image.reads
    assert read(cache, UNIT, UNIT) == image.content[UNIT : 2 * UNIT]
    assert image.reads == [1]


def test_what_the_snapshot_does_not_use_takes_no_room(cache: BufferCache, image: Image) -> None:
    assert read(cache, 5 * UNIT, UNIT) == bytes(UNIT)
    assert not image.reads
    assert cache.status()["hydrated"] == 0


def test_many_who_want_a_unit_at_once_have_it_fetched_once(cache: BufferCache, image: Image) -> None:
    image.gate.clear()
    found: list[bool] = []

    def look(offset: int) -> None:
        found.append(read(cache, offset, 4096) == image.content[offset : offset + 4096])

    threads = [threading.Thread(target=look, args=[number * 4096]) for number in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    image.gate.set()
    for thread in threads:
        thread.join()
    assert found == [True] * 16
    assert image.reads == [0]


def test_hammered_from_many_sides_it_is_never_wrong_and_never_too_large(cache: BufferCache, image: Image) -> None:
    wrong: list[str] = []
    until = time.monotonic() + SECONDS
    reads = [0] * 8

    def hammer(index: int) -> None:
        chance = random.Random(index)
        while time.monotonic() < until and not wrong:
            start = chance.randrange(SIZE)
            length = min(chance.choice([1, 512, 4096, UNIT, 3 * UNIT]), SIZE - start)
            try:
                if read(cache, start, length) != image.content[start : start + length]:
                    wrong.append(f"{length} bytes at {start}")
            except Exception as error:
                wrong.append(repr(error))
            reads[index] += 1

    threads = [threading.Thread(target=hammer, args=[index]) for index in range(len(reads))]
    for thread in threads:
        thread.start()
    largest = 0
    while any(thread.is_alive() for thread in threads):
        largest = max(largest, os.fstat(cache._descriptor).st_blocks * 512)
        assert cache.status()["hydrated"] <= SLOTS * UNIT
        time.sleep(0.01)
    assert not wrong
    assert 0 < largest <= SLOTS * UNIT
    assert sum(reads) > 200
    assert len(image.reads) > UNITS, "nothing was ever driven out"
    assert all(not unit.readers for unit in cache._units.values())
    assert len(cache._free) + len(cache._units) == SLOTS


def test_where_all_slots_are_being_read_a_unit_is_not_kept(cache: BufferCache, image: Image) -> None:
    read(cache, 0, 1)
    for number in range(6, 6 + SLOTS - 1):
        read(cache, number * UNIT, 1)
    for unit in cache._units.values():
        unit.readers += 1
    assert read(cache, UNIT, UNIT) == image.content[UNIT : 2 * UNIT]
    assert list(cache._units) == [0, *range(6, 6 + SLOTS - 1)]


def test_what_cannot_be_had_is_an_error_for_all_who_wait_and_for_nobody_else(cache: BufferCache, image: Image) -> None:
    image.failing.add(2)
    with pytest.raises(BlockferryError, match="the chunk is lost"):
        read(cache, 2 * UNIT, 1)
    with pytest.raises(BlockferryError, match="a moment ago"):
        read(cache, 2 * UNIT, 1)
    assert read(cache, 3 * UNIT, 1) == image.content[3 * UNIT : 3 * UNIT + 1]


def test_a_full_filesystem_makes_it_slow_and_not_wrong(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = [2 * UNIT]  # what the filesystem still has

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with tempfile.TemporaryFile(dir=tmp_path, buffering=0) as file:
        cache = BufferCache(source_of(image), file.fileno(), SLOTS, directory=str(tmp_path))
        for number in (0, 1, 2, 0, 1, 3):  # 2 finds no room, 3 takes the slot of 0
            assert read(cache, number * UNIT, UNIT) == image.content[number * UNIT : (number + 1) * UNIT]
        assert image.reads == [0, 1, 2, 3]
        assert caplog.text.count("No space left on device") == 1
        room[0] = SIZE
        monkeypatch.setattr(buffer, "_TRY_FULL_AGAIN", 0.0)
        cache._full_until = 0.0
        for number in (4, 6, 7, 8):
            read(cache, number * UNIT, 1)
        assert cache.status()["hydrated"] == SLOTS * UNIT


@pytest.mark.parametrize(
    ("size", "words"), [(SLOTS * UNIT, "no buffer can be made there"), (3 * UNIT + 4095, "too small")]
)
def test_a_buffer_that_cannot_be_is_refused(image: Image, tmp_path: Path, size: int, words: str) -> None:
    made = blockferry_restore_cache(source_of(image), options(tmp_path / "missing", size))
    assert made is not None
    with pytest.raises(BlockferryError, match=words), made:
        pass


def test_the_name_of_a_restore_onto_a_target_is_not_taken(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path))
    attachment.make_directory("name")
    Attachment("name", "borg:x", "0123456789ab", "/dev/target", SIZE, 512, SIZE).save()
    made = blockferry_restore_cache(source_of(image), options(tmp_path, SLOTS * UNIT))
    assert made is not None
    with pytest.raises(UsageError, match="/dev/target"), made:
        pass


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 64 MiB, full but for a hole."""
    path = tmp_path_factory.mktemp("volume") / "volume.img"
    path.write_bytes(random.Random(9).randbytes(48 << 20))
    with path.open("r+b") as file:
        file.truncate(64 << 20)
    return path


@pytest.fixture(scope="module")
def depots(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Depot]:
    """A repository of each tool that has the volume."""
    made = {tool: new_depot(tool, tmp_path_factory.mktemp(tool) / "repository") for tool in ("borg", "restic")}
    for depot in made.values():
        assert depot.ferry("backup", volume).code == 0
    return made


@contextlib.contextmanager
def attached(depot: Depot, *words: object) -> Iterator[dict]:
    said = depot.ferry("attach", "latest", *words, "--json").json()
    try:
        yield said
    finally:
        gone: Done = blockferry("detach", said["name"], "--force")
        assert gone.code in (0, 1), gone.err


@pytest.mark.root
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("tool", ["borg", "restic"])
def test_a_disk_larger_than_its_buffer_is_read_through_it(
    depots: dict[str, Depot], tool: str, volume: Path, tmp_path: Path
) -> None:
    with attached(depots[tool], "--buffer", tmp_path, "--size", "20M") as said:
        assert (said["name"], said["target"], said["buffer"]) == ("latest", "", str(tmp_path))
        assert Path(said["device"]).is_block_device()
        run("cmp", volume, said["device"])
        after = blockferry("status", "latest", "--json").json()
        assert after["fetched"] == after["total"] == 48 << 20
        assert 0 < after["hydrated"] <= after["buffer_size"] <= 20 << 20
        assert space_of_the_buffer(after["process"], tmp_path) <= 20 << 20
        assert not list(tmp_path.glob("tmp*")), "the buffer has a name"
        with open(said["device"], "r+b", buffering=0) as disk, pytest.raises(PermissionError):
            disk.write(bytes(4096))
        assert "latest" in blockferry("status").out
        assert "nothing is kept of it" in blockferry("detach", "latest").out
        assert blockferry("status", "--json").json()["restores"] == []


def space_of_the_buffer(process: int, directory: Path) -> int:
    """Return the bytes that the file without a name takes up, which `du` finds only by its descriptor."""
    places = [
        each for each in Path(f"/proc/{process}/fd").iterdir() if str(each.readlink()).startswith(f"{directory}/")
    ]
    unnamed = [each for each in places if str(each.readlink()).endswith("(deleted)")]
    assert len(unnamed) == 1, [str(each.readlink()) for each in places]
    return int(run("du", "--dereference", "--block-size=1", unnamed[0]).split()[0])


@pytest.mark.root
@pytest.mark.usefixtures("runtime")
def test_a_full_filesystem_makes_no_read_fail(depots: dict[str, Depot], volume: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=14M", "none", small)
    try:
        with attached(depots["borg"], "--buffer", small, "--size", "32M") as said:
            run("cmp", volume, said["device"])
            assert blockferry("status", "latest", "--json").json()["hydrated"] <= 14 << 20
        assert "No space left on device" in (tmp_path / "run" / "hot" / "latest.log").read_text()
    finally:
        run("umount", small)


@pytest.mark.root
@pytest.mark.usefixtures("runtime")
def test_one_that_was_killed_is_known_until_it_is_detached(
    depots: dict[str, Depot], volume: Path, tmp_path: Path
) -> None:
    with attached(depots["borg"], "--buffer", tmp_path, "--size", "32M", "--name", "gone") as said:
        os.kill(said["process"], 9)
        run("losetup", "--detach", said["device"])
        wait_for_end_of(said["process"])
        assert blockferry("status", "--json").json()["restores"][0]["state"] == "broken off"
        assert blockferry("detach", "gone").code == 0
        assert blockferry("status", "--json").json()["restores"] == []
        blockferry("detach", "gone").refused(1, "no such restore")


def wait_for_end_of(process: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}/mounts").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Name a device or file as the target, or a directory for a --buffer"),
        (("/dev/null", "--buffer", "/tmp", "--size", "1G"), "a target needs no buffer"),
        (("--buffer", "/tmp"), "--size"),
        (("/dev/null", "--size", "1G"), "--buffer"),
        (("--buffer", "/tmp", "--size", "lots"), "not a number of bytes"),
    ],
)
def test_words_that_say_no_place_are_refused(words: tuple[str, ...], told: str) -> None:
    blockferry("attach", "latest", *words, "--repo", "borg:/nowhere").refused(2, told)


@pytest.mark.root
@pytest.mark.usefixtures("runtime")
def test_a_name_that_is_attached_is_not_taken_for_another(
    depots: dict[str, Depot], volume: Path, tmp_path: Path
) -> None:
    with attached(depots["borg"], "--buffer", tmp_path, "--size", "32M"):
        other = depots["borg"].ferry("attach", "latest", tmp_path / "target", "--name", "latest")
        other.refused(2, "is attached already")
        assert not (tmp_path / "target").exists()
