"""The kernel's snapshots and before-image logs are one format: each reads, and goes on with, what the other wrote."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blockferry.cluster.log import LogLayer
from blockferry.cluster.log_writer import LogWriter
from blockferry.layers import FileLayer, Stack
from conftest import Attach
from devicemapper_support import contents, differing, run

pytestmark = pytest.mark.root

KIB = 1 << 10
SIZE = (5 << 20) + 24 * KIB
"""Its last chunk of 64 KiB is a short one."""
ORIGIN, SNAPSHOT = "/dev/mapper/blockferry-origin", "/dev/mapper/blockferry-snapshot"

# With chunks of 4 KiB an area has 256 pairs.
SIZES = pytest.mark.parametrize(
    ("chunk", "count"),
    [(64 * KIB, 40), *(pytest.param(4 * KIB, count, marks=pytest.mark.thorough) for count in (256, 300))],
)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An image with something everywhere."""
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(SIZE))
    return image


@contextlib.contextmanager
def snapshot(attach: Attach, volume: Path, store: Path, chunk: int) -> Iterator[None]:
    """Have the kernel copy what is overwritten of a volume to a store."""
    origin, kept = attach(volume), attach(store)
    sectors = SIZE // 512
    table = f"0 {sectors} snapshot {origin} {kept} P {chunk // 512}"
    run("dmsetup", "create", "blockferry-snapshot", "--table", table)
    try:
        run("dmsetup", "create", "blockferry-origin", "--table", f"0 {sectors} snapshot-origin {origin}")
        try:
            yield
            assert "Invalid" not in run("dmsetup", "status", "blockferry-snapshot")
        finally:
            run("dmsetup", "remove", "--retry", "blockferry-origin")
    finally:
        run("dmsetup", "remove", "--retry", "blockferry-snapshot")


def overwrite(path: str | Path, chunk: int, numbers: list[int]) -> None:
    """Write something to chunks."""
    with open(path, "r+b", buffering=0) as disk:
        for number in numbers:
            place = number * chunk + random.randrange(chunk // 4)
            os.pwrite(disk.fileno(), os.urandom(random.randrange(1, chunk // 8)), place)
        os.fsync(disk.fileno())


def at_the_instant(log: Path, volume: Path) -> bytes:
    """Return a volume with a log over it."""
    buffer = bytearray(SIZE)
    with LogLayer(log, SIZE) as layer, volume.open("rb") as file:
        Stack([layer, FileLayer(file.fileno(), SIZE)], SIZE).read_into(0, memoryview(buffer))
    return bytes(buffer)


@SIZES
def test_a_snapshot_s_store_is_a_log(tmp_path: Path, attach: Attach, volume: Path, chunk: int, count: int) -> None:
    before, store, last = volume.read_bytes(), tmp_path / "store.img", (SIZE - 1) // chunk
    store.touch()
    os.truncate(store, SIZE + (1 << 20))
    numbers = [last, *random.sample(range(last), count - 1)]
    with snapshot(attach, volume, store, chunk):
        overwrite(ORIGIN, chunk, numbers)
    with LogLayer(store, SIZE) as log:
        assert log.chunk == chunk
        assert log.chunks.tolist() == sorted(numbers)
        assert log.extents == differing(before, volume.read_bytes()).align(chunk, SIZE)
    assert at_the_instant(store, volume) == before


@SIZES
def test_a_log_is_a_snapshot_s_store(tmp_path: Path, attach: Attach, volume: Path, chunk: int, count: int) -> None:
    before, log = volume.read_bytes(), tmp_path / "log"
    last = (SIZE - 1) // chunk
    numbers = [last, *random.sample(range(last), count - 1)]
    with LogWriter(log, chunk=chunk, size=SIZE) as writer:
        for batch in (numbers[:100], numbers[100:]):
            images = [memoryview(before[number * chunk : (number + 1) * chunk]) for number in batch]
            writer.append(np.array(batch, np.int64), images)
    overwrite(volume, chunk, numbers)
    os.truncate(log, SIZE + (1 << 20))  # room for what the kernel copies
    others = random.sample(sorted(set(range(last)) - set(numbers)), 20)
    with snapshot(attach, volume, log, chunk):
        assert contents(SNAPSHOT) == before
        overwrite(ORIGIN, chunk, numbers[:20] + others)
    with LogLayer(log, SIZE) as layer:
        assert layer.chunks.tolist() == sorted([*numbers, *others])
    assert at_the_instant(log, volume) == before
