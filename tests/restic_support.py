"""Real restic repositories, and images of which every byte is known."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import zlib
from pathlib import Path

import numpy as np

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer, CutLayer, FileLayer
from blockferry.repository import Base
from blockferry.snapshot import Record, Snapshot, Stability, Stored, Tier, new_snapshot_id, now
from blockferry_restic.plugin import blockferry_open_repository
from blockferry_restic.repository import ResticRepository

PASSWORD = "a password, with 'quotes'"
MIB = 1 << 20


def restic(repository: Path | str, *arguments: object, code: int = 0) -> str:
    """Run restic itself on a repository; an AssertionError with all that it said if it ends otherwise."""
    command = ["restic", "-r", str(repository), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def open_repository(where: Path | str) -> ResticRepository:
    """Open a repository through the plugin's hook."""
    repository = blockferry_open_repository(f"restic:{where}", os.environ)
    assert isinstance(repository, ResticRepository)
    return repository


@dataclasses.dataclass
class Image:
    """An image file, its bytes, and which of them are in use."""

    path: Path
    content: np.ndarray
    used: ExtentSet

    @property
    def size(self) -> int:
        return int(self.content.size)

    @property
    def volume(self) -> str:
        """A name that needs quoting, and that no other test has."""
        return f"disk of Zoë, {zlib.crc32(str(self.path).encode()):x}"

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def expected(self) -> bytes:
        """What a restore must give: the bytes in use, zero elsewhere."""
        kept = np.zeros_like(self.content)
        for start, length in self.used:
            kept[start : start + length] = self.content[start : start + length]
        return kept.tobytes()

    def block_map(self, changed: ExtentSet | None = None) -> BlockMap:
        """All that is in use as data, or only what changed, the rest as in the base."""
        if changed is None:
            return BlockMap.build(self.size, data=self.used)
        return BlockMap.build(self.size, data=changed.intersection(self.used), same=self.used)

    def record(self, base: Snapshot | None, unit: int) -> Record:
        return Record(
            snapshot=new_snapshot_id(),
            created=now(),
            host="a-host",
            volume=self.volume,
            path=str(self.path),
            size=self.size,
            block_size=512,
            filesystem="",
            identity={},
            tier=Tier.CHANGED if base else Tier.USED,
            tier_reason="",
            method="a test",
            stability=Stability.OFFLINE,
            freeze="nobody writes",
            unit=unit,
            bytes_used=self.used.total,
            bytes_changed=self.used.total,
            base=base.id if base else None,
        )


def make_image(path: Path, size: int, used: ExtentSet) -> Image:
    """Make an image with random bytes everywhere, also where it is not in use, and a stretch of zeros and text."""
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    content[size // 3 : size // 2] = 0
    content[size // 2 : size // 2 + size // 8] = np.resize(np.frombuffer(b"the same words ", np.uint8), size // 8)
    content.tofile(path)
    return Image(path, content, used)


class CountingLayer(BaseLayer):
    """Another layer, of which every read is noted; from `fails_at` bytes on reading fails."""

    def __init__(self, layer: BaseLayer, fails_at: int | None = None) -> None:
        self.layer = layer
        self.size = layer.size
        self.extents = layer.extents
        self.reads: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        if self.fails_at is not None and sum(length for _offset, length in self.reads) > self.fails_at:
            raise VolumeError(f"reading at {offset} failed", remedy="Look at the kernel log.")
        self.layer.read_into(offset, buffer)


def store(
    repository: ResticRepository,
    image: Image,
    base: Snapshot | None = None,
    changed: ExtentSet | None = None,
    *,
    told: list[int] | None = None,
    fails_at: int | None = None,
) -> tuple[Stored, CountingLayer]:
    """Back up an image; give back what came of it and the layer it was read through."""
    descriptor = os.open(image.path, os.O_RDONLY)
    try:
        source = CountingLayer(CutLayer(FileLayer(descriptor, image.size), image.used), fails_at)
        record = image.record(base, repository.unit(image.size))
        advance = (told if told is not None else []).append
        block_map = image.block_map(changed)
        bases = [Base(base, block_map.on_grid(record.unit).extents(Kind.SAME))] if base else []
        return repository.store(source, block_map, record, bases=bases, advance=advance), source
    finally:
        os.close(descriptor)


def content_of(repository: ResticRepository, snapshot: Snapshot) -> bytes:
    """Return a snapshot's whole image, read at once."""
    layer = repository.open(snapshot)
    try:
        buffer = bytearray(layer.size)
        layer.read_into(0, memoryview(buffer))
        return bytes(buffer)
    finally:
        layer.close()


def mounts(image: Image) -> list[str]:
    """Return the mounts of trees of this image that this machine has now."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", image.volume)
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{name}" in line]


def restic_mounts(repository: Path) -> list[str]:
    """Return what `restic mount` shows of this repository now."""
    source = f" restic:{json.loads(restic(repository, 'cat', 'config', '--no-lock'))['id'][:10]} "
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if source in line]
