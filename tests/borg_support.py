"""Real borgs, repositories and volumes for the tests of the borg adapter."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer
from blockferry.repository import Base
from blockferry.snapshot import Record, Snapshot, Stability, Stored, Tier, new_snapshot_id, now

MIB = 1 << 20
_TOOLS = Path(__file__).parent.parent / ".tools"
BORGS = {
    "1.2": os.environ.get("BORG_1_2_FOR_TESTS", "/usr/bin/borg"),
    "1.4": os.environ.get("BORG_1_4_FOR_TESTS", str(_TOOLS / "borg-1.4/bin/borg")),
    "2": os.environ.get("BORG_2_FOR_TESTS", str(_TOOLS / "borg-2/bin/borg")),
}
"""The borg commands that the tests run, by series."""


newest = pytest.mark.parametrize("series", ["1.4"], indirect=True)
"""For what is the same code whatever borg is behind it."""


def missing(series: str) -> str:
    """Return why tests with a series cannot run, and the remedy; empty if they can."""
    command = BORGS[series]
    if shutil.which(command):
        version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
        if version.startswith(series):
            return ""
    variable = f"BORG_{series.replace('.', '_')}_FOR_TESTS"
    return f"no borg {series} at {command}: install it in a venv there, or name it in {variable}"


class Volume(BaseLayer):
    """Bytes in memory that count what is read of them."""

    def __init__(self, content: np.ndarray, *, fails_at: int | None = None) -> None:
        self.content = content
        self.size = content.size
        self.extents = ExtentSet.whole(self.size)
        self.bytes_read = 0
        self.fails_at = fails_at

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.fails_at is not None and offset + len(buffer) > self.fails_at:
            raise OSError(5, "the disk is broken here")
        np.frombuffer(buffer, np.uint8)[:] = self.content[offset : offset + len(buffer)]
        self.bytes_read += len(buffer)


def content(size: int, seed: int = 0) -> np.ndarray:
    """Return bytes of which half compress well."""
    made = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    made[(np.arange(size) >> 16) % 2 == 1] = seed % 256
    return made


def expected(volume: np.ndarray, used: ExtentSet) -> bytes:
    """Return the image that a restore gives: the bytes in use, zeros elsewhere."""
    image = np.zeros_like(volume)
    for start, length in used:
        image[start : start + length] = volume[start : start + length]
    return image.tobytes()


def record_of(size: int, unit: int = MIB, base: Snapshot | None = None) -> Record:
    """Return the record of a new snapshot of a volume called `vm.disk`."""
    return Record(
        snapshot=new_snapshot_id(),
        created=now(),
        host="host",
        volume="vm.disk",
        path="/dev/vm/disk",
        size=size,
        block_size=512,
        filesystem="ext4",
        identity={"filesystem_uuid": "1234"},
        tier=Tier.USED,
        tier_reason="no tracker",
        method="test",
        stability=Stability.OFFLINE,
        freeze="offline",
        unit=unit,
        bytes_used=size,
        bytes_changed=size,
        base=base.id if base else None,
    )


@dataclasses.dataclass
class Place:
    """A repository, and the borg that it was made with."""

    borg: str
    location: str

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run the stock borg."""
        return subprocess.run([self.borg, *arguments], capture_output=True, check=check)

    def archives(self) -> list[str]:
        """Return the names of all archives that the stock borg lists."""
        return self.run("list", "--short", self.location).stdout.decode().split()

    def extract(self, archive: str, item: str = "volume.img") -> bytes:
        """Return an item's bytes as the stock borg extracts them."""
        return self.run("extract", "--stdout", f"{self.location}::{archive}", item).stdout

    def check(self) -> None:
        """Have the stock borg look at everything; fails if it finds anything."""
        done = self.run("check", "--verify-data", self.location, check=False)
        assert done.returncode == 0, done.stderr.decode()


def store(
    repository: object, volume: Volume, block_map: BlockMap, *, base: Snapshot | None = None, unit: int = MIB
) -> Stored:
    """Store a volume as a backup would."""
    record = record_of(volume.size, unit, base)
    bases = [Base(base, block_map.on_grid(unit).extents(Kind.SAME))] if base else []
    return repository.store(volume, block_map, record, bases=bases, advance=lambda _count: None)


def used(*megabytes: tuple[float, float], size: int) -> ExtentSet:
    """Return extents given as (start, length) in MiB, cut at `size`."""
    return ExtentSet.from_pairs([(int(start * MIB), int(length * MIB)) for start, length in megabytes]).clip(0, size)


def read_all(layer: BaseLayer, batch: int = 3 * MIB) -> bytes:
    """Return all of a layer's bytes as its stream gives them."""
    image = bytearray(layer.size)
    position = 0
    for offset, piece in layer.stream(ExtentSet.whole(layer.size), batch):
        assert offset == position
        assert len(piece) <= batch
        image[offset : offset + len(piece)] = piece
        position += len(piece)
    assert position == layer.size
    return bytes(image)
