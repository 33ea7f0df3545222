"""Sets made by hand: a volume that is written to while its shares are stored, and a log of what was there before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from blockferry.chain import trace
from blockferry.cluster.stored import close_set, store_share
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer
from blockferry.repository import Repository
from blockferry.snapshot import Record, Snapshot, Stability, Tier, new_snapshot_id, now

CHUNK = 64 << 10


class Bytes(BaseLayer):
    """A volume in memory, or some of it; what is outside of the extents is noise that nobody may see."""

    def __init__(self, content: bytes | bytearray, extents: ExtentSet | None = None) -> None:
        self.content = content
        self.size = len(content)
        self.extents = ExtentSet.whole(self.size) if extents is None else extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for start, length in self.extents.complement(self.size).clip(offset, offset + len(buffer)):
            buffer[start - offset : start - offset + length] = bytes(length)
        for start, length in self.extents.clip(offset, offset + len(buffer)):
            buffer[start - offset : start - offset + length] = self.content[start : start + length]


class SharedVolume:
    """A volume during a backup: the first write to a chunk saves what was there, as every host's guard does."""

    def __init__(self, content: bytes | bytearray, chunk: int = CHUNK) -> None:
        self.instant = bytes(content)
        self.content = bytearray(content)
        self.chunk = chunk
        self.log: dict[int, bytes] = {}

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        for number in range(offset // self.chunk, -(-end // self.chunk)):
            self.log.setdefault(number, bytes(self.content[number * self.chunk : (number + 1) * self.chunk]))
        self.content[offset:end] = data

    def entire_log(self) -> Bytes:
        """Return the log, over a background of noise."""
        size = len(self.content)
        content = bytearray(np.random.default_rng(size).bytes(size))
        for number, image in self.log.items():
            content[number * self.chunk : number * self.chunk + len(image)] = image
        starts = np.array(sorted(self.log), np.int64) * self.chunk
        return Bytes(content, ExtentSet.from_ranges(starts, np.minimum(starts + self.chunk, size)))


@dataclasses.dataclass(frozen=True)
class MadeSet:
    """A set in a repository, and what it is of."""

    snapshot: Snapshot
    shares: list[Snapshot]
    record: Record
    used: ExtentSet
    instant: bytes
    log: Bytes

    def assert_is(self, content: bytes | bytearray) -> None:
        """Compare a restored volume with the instant, where it was in use."""
        assert len(content) == len(self.instant)
        for start, length in self.used:
            assert content[start : start + length] == self.instant[start : start + length], (start, length)


def common_record(size: int, unit: int, *, method: str = "bitmaps", **others: object) -> Record:
    """Return what is the same of all parts of a set."""
    fields: dict[str, object] = {
        "snapshot": new_snapshot_id(),
        "created": now(),
        "host": "one of several",
        "volume": "shared",
        "path": "/dev/shared",
        "size": size,
        "block_size": 512,
        "filesystem": "ocfs2",
        "identity": {"filesystem_uuid": "1234"},
        "tier": Tier.USED,
        "tier_reason": "",
        "method": method,
        "stability": Stability.CRASH_CONSISTENT,
        "freeze": "logs of what was there before",
        "unit": unit,
        "bytes_used": 0,
        "bytes_changed": 0,
    }
    return Record(**fields | others)  # type: ignore[arg-type]


def make_set(
    repository: Repository,
    volume: SharedVolume,
    used: ExtentSet,
    cuts: Sequence[ExtentSet],
    writes: Mapping[int, Sequence[tuple[int, bytes]]],
    record: Record,
) -> MadeSet:
    """Store a set: `writes` says what is written before which of the shares, and, by their number, after the last."""
    shares = []
    for number, cut in enumerate([*cuts, None]):
        for offset, data in writes.get(number, []):
            volume.write(offset, data)
        if cut is not None:
            copy = Bytes(bytes(volume.content))
            stored = store_share(repository, copy, used.intersection(cut), record, lambda _count: None)
            shares.append(stored.snapshot)
    log = volume.entire_log()
    closed = close_set(repository, log, shares, used, record, lambda _count: None)
    return MadeSet(closed.snapshot, shares, record, used, volume.instant, log)


def state_of(repository: Repository, snapshot: Snapshot) -> bytes:
    """Return a snapshot's state of its volume, read in two ways."""
    image = trace(repository, snapshot).open(repository)
    with image:  # type: ignore[attr-defined]
        found, streamed = bytearray(image.size), bytearray(image.size)
        image.read_into(0, memoryview(found))
        for offset, piece in image.stream(image.extents, 100_000):
            streamed[offset : offset + len(piece)] = piece
        assert found == streamed
        return bytes(found)
