"""The write path of one host: nothing is lost in it, it holds and lets go, and what it overwrites is logged first."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockferry.cluster import shared_device
from blockferry.cluster.before_images import BeforeImages
from blockferry.cluster.guard import Guard, HeldTooLongError, Logged
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log import LogLayer
from blockferry.cluster.log_writer import LogWriter
from blockferry.cluster.write_back import WriteBack
from blockferry.errors import BlockferryError
from blockferry.layers import Stack
from blockferry.manager import log_index_named, plugin_manager
from blockferry.volume import Volume
from conftest import Attach

pytestmark = pytest.mark.root

SIZE = (1 << 20) + 3 * 4096
CHUNK = 16 << 10


@pytest.fixture
def volume(tmp_path: Path, attach: Attach) -> Volume:
    image = tmp_path / "volume.img"
    image.write_bytes(random.Random(3).randbytes(SIZE))
    return Volume.discover(attach(image))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LogIndex]:
    with contextlib.closing(log_index_named(plugin_manager(), f"sqlite://{tmp_path / 'index'}")) as opened:
        opened.open_claims("epoch")
        yield opened


@contextlib.contextmanager
def guarding(volume: Volume, buffer: int = 0) -> Iterator[tuple[Guard, Logged, shared_device.SharedDevice]]:
    with shared_device.opened(volume) as device, contextlib.ExitStack() as held:
        logged = Logged(device)
        below = held.enter_context(contextlib.closing(WriteBack(logged, buffer))) if buffer else logged
        yield Guard(logged, below), logged, device


def content_of(volume: Volume) -> bytes:
    with volume.open_data() as disk:
        buffer = bytearray(SIZE)
        disk.read_into(0, memoryview(buffer))
        return bytes(buffer)


def read(guard: Guard, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    guard.read_into(offset, memoryview(buffer))
    return bytes(buffer)


places = st.integers(0, SIZE - 1)
steps = st.lists(
    st.tuples(st.sampled_from(["write", "write", "blocks", "zero", "read", "sync"]), places, st.integers(1, 70_000)),
    max_size=25,
)


@pytest.mark.parametrize("buffer", [0, 4 << 20])
def test_what_is_written_is_read_and_on_the_volume_when_it_is_synced(volume: Volume, buffer: int) -> None:
    with guarding(volume, buffer) as (guard, _logged, _device):
        now = bytearray(content_of(volume))

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(steps=steps, seed=st.integers(0, 1 << 30))
        def check(steps: list[tuple[str, int, int]], seed: int) -> None:
            chance = random.Random(seed)
            for what, place, count in steps:
                offset, length = place, min(count, SIZE - place)
                if what == "blocks":
                    offset = place // 4096 * 4096
                    length = min(-(-count // 4096) * 4096, SIZE - offset)
                if what in ("write", "blocks"):
                    now[offset : offset + length] = data = chance.randbytes(length)
                    guard.write(offset, memoryview(data))
                elif what == "zero":
                    now[offset : offset + length] = bytes(length)
                    guard.zero(offset, length)
                elif what == "read":
                    assert read(guard, offset, length) == now[offset : offset + length]
                else:
                    guard.sync()
                    assert content_of(volume) == now
            assert read(guard, 0, SIZE) == now

        check()
    assert content_of(volume) == now


def test_a_buffer_that_cannot_be_emptied_says_so_at_the_next_sync(volume: Volume) -> None:
    with pytest.raises(BlockferryError, match="failed"), guarding(volume, 4 << 20) as (guard, logged, _device):
        logged.write = _fails  # type: ignore[method-assign]
        guard.write(0, memoryview(bytes(4096)))
        with pytest.raises(BlockferryError, match="it failed"):
            guard.sync()
        with pytest.raises(BlockferryError, match="it failed"):
            guard.write(0, memoryview(bytes(4096)))


def _fails(_offset: int, _data: memoryview) -> None:
    raise BlockferryError("it failed")


@pytest.mark.parametrize("buffer", [0, 4 << 20])
def test_held_writes_wait_and_what_passed_before_is_on_the_volume(volume: Volume, buffer: int) -> None:
    with guarding(volume, buffer) as (guard, _logged, _device):
        stopping = threading.Event()
        passed = [0] * 3

        def write(number: int) -> None:
            while not stopping.is_set():
                passed[number] += 1
                guard.write(number * 65536, memoryview(passed[number].to_bytes(8, "big") * 512))

        threads = [threading.Thread(target=write, args=[number]) for number in range(len(passed))]
        for thread in threads:
            thread.start()
        for _ in range(5):
            time.sleep(0.05)
            guard.hold(5)
            first = content_of(volume)
            time.sleep(0.05)
            assert content_of(volume) == first
            for number, count in enumerate(passed):
                there = int.from_bytes(first[number * 65536 :][:8], "big")
                assert first[number * 65536 :][:4096] == first[number * 65536 :][:8] * 512
                assert there in (count, count - 1)  # the last one waits
            guard.release(None)
        stopping.set()
        for thread in threads:
            thread.join(5)


def test_held_too_long_writes_pass_by_themselves(volume: Volume) -> None:
    with guarding(volume) as (guard, _logged, _device):
        guard.hold(0.3)
        began = time.monotonic()
        guard.write(0, memoryview(bytes(4096)))
        assert 0.2 < time.monotonic() - began < 1
        with pytest.raises(HeldTooLongError):
            guard.release(None)
        guard.write(0, memoryview(bytes(4096)))


def test_a_write_that_does_not_end_cannot_be_held(volume: Volume) -> None:
    with guarding(volume) as (guard, logged, _device):
        going_on = threading.Event()
        logged.write = lambda _offset, _data: going_on.wait()  # type: ignore[method-assign,assignment,return-value]
        thread = threading.Thread(target=guard.write, args=[0, memoryview(bytes(4096))])
        thread.start()
        with pytest.raises(HeldTooLongError, match="under way"):
            guard.hold(0.2)
        going_on.set()
        thread.join(5)


@pytest.mark.parametrize("writers", [1, 6])
def test_the_log_over_the_volume_is_what_the_volume_was(
    volume: Volume, index: LogIndex, tmp_path: Path, writers: int
) -> None:
    before = content_of(volume)
    with guarding(volume) as (guard, _logged, device):
        images = BeforeImages(device, index, "epoch", "a", LogWriter(tmp_path / "log", chunk=CHUNK, size=SIZE))
        guard.hold(5)
        guard.release(images)

        def write(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(60):
                length = chance.choice([1, 4096, 30_000, 100_000])
                offset = chance.randrange(SIZE // 2 - length)
                guard.write(offset, memoryview(chance.randbytes(length)))
                if not chance.randrange(20):
                    guard.zero(offset, length)

        threads = [threading.Thread(target=write, args=[seed]) for seed in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        guard.log_by(None)
        images.end()
        assert images.failure == ""
    with LogLayer(tmp_path / "log", SIZE) as log, volume.open_data() as disk:
        assert log.extents.total == images.bytes_logged == len(index.claimed("epoch", "a")) * CHUNK
        assert log.extents.end <= SIZE // 2 + CHUNK
        was = bytearray(SIZE)
        Stack([log, disk], SIZE).read_into(0, memoryview(was))
        assert was == before


def test_what_another_host_has_claimed_is_not_logged(volume: Volume, index: LogIndex, tmp_path: Path) -> None:
    with guarding(volume) as (guard, _logged, device):
        assert index.claim("epoch", "b", np.array([0, 2])).all()
        images = BeforeImages(device, index, "epoch", "a", LogWriter(tmp_path / "log", chunk=CHUNK, size=SIZE))
        guard.log_by(images)
        guard.write(0, memoryview(bytes(4 * CHUNK)))
        guard.write(0, memoryview(bytes(4 * CHUNK)))
        images.end()
    with LogLayer(tmp_path / "log", SIZE) as log:
        assert list(log.extents) == [(CHUNK, CHUNK), (3 * CHUNK, CHUNK)]


@pytest.mark.parametrize("fault", ["closed", "log is full"])
def test_what_cannot_or_need_not_be_logged_passes(
    volume: Volume, index: LogIndex, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarding(volume) as (guard, _logged, device):
        writer = LogWriter(tmp_path / "log", chunk=CHUNK, size=SIZE)
        images = BeforeImages(device, index, "epoch", "a", writer)
        guard.log_by(images)
        if fault == "closed":
            index.close_claims("epoch")
        else:
            monkeypatch.setattr(writer, "append", _is_full)
        threads = [
            threading.Thread(target=guard.write, args=[number * CHUNK, memoryview(bytes([number]) * CHUNK)])
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert bool(images.failure) == (fault != "closed")
        images.end()
        assert images.bytes_logged == 0
    assert content_of(volume)[: 8 * CHUNK] == b"".join(bytes([number]) * CHUNK for number in range(8))


def _is_full(_chunks: object, _images: object) -> None:
    raise BlockferryError("no room")
