"""A volume, its tracker and a repository in memory: the edges of the program, so that its middle can be run fast.

They keep the contracts that the real ones keep, and break them only where a test asks for it. The middle is real:
`back_up`, `merge`, `delete` and `trace` are called as the commands call them, through a real plugin manager.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pluggy

from blockferry import hookspecs
from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import BaseUnusableError, DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Frozen, UsedBlocks, hookimpl
from blockferry.layers import BaseLayer
from blockferry.repository import Base, plan
from blockferry.snapshot import WHOLE, Record, Snapshot, Stability, Stored
from blockferry.volume import Volume

BLOCK = 512


class Disk:
    """A volume as a file, what is in use on it, and a plugin for all that a backup asks of it."""

    def __init__(self, path: Path, size: int, method: str = "bitmaps") -> None:
        self.path = path
        self.content = bytearray(random.Random(size).randbytes(size))
        self.used = [True] * (size // BLOCK)
        self.method = method
        self.uuid = "the first filesystem"
        self.tracker = Tracker()
        self.before_freeze: Callable[[], None] = lambda: None
        self.after_freeze: Callable[[], None] = lambda: None
        self.frozen_state = b""

    @property
    def volume(self) -> Volume:
        """The volume as `Volume.discover` would find it."""
        return Volume(str(self.path), "disk", len(self.content), BLOCK, False, "", {"filesystem_uuid": self.uuid})

    def manager(self) -> pluggy.PluginManager:
        """Return a manager that knows only this disk."""
        self.path.write_bytes(self.content)
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(self)
        manager.register(self.tracker)
        return manager

    def write(self, offset: int, data: bytes, *, in_use: bool = True) -> None:
        """Write, and have the tracker see it."""
        end = offset + len(data)
        self.content[offset:end] = data
        for number in range(offset // BLOCK, -(-end // BLOCK)):
            self.used[number] = in_use
        self.tracker.saw(offset, len(data))

    def state(self) -> bytes:
        """Return what a restore has to give: what is in use, zeros where nobody would look."""
        if self.method == WHOLE:
            return bytes(self.content)
        pieces = [
            self.content[i * BLOCK : (i + 1) * BLOCK] if used else bytes(BLOCK) for i, used in enumerate(self.used)
        ]
        return b"".join(pieces)

    @hookimpl
    def blockferry_freeze(self, volume: Volume) -> contextlib.AbstractContextManager[Frozen]:
        """Hold a copy still, with writes right before and right after."""
        return self._held(volume)

    @contextlib.contextmanager
    def _held(self, volume: Volume) -> Iterator[Frozen]:
        self.before_freeze()
        copy = self.path.with_suffix(".frozen")
        copy.write_bytes(self.content)
        self.frozen_state = self.state()
        self.frozen_used = self.used_blocks()
        self.after_freeze()
        yield Frozen(dataclasses.replace(volume, path=str(copy)), Stability.FROZEN, "copy")

    @hookimpl
    def blockferry_used_extents(self) -> UsedBlocks:
        """Answer for the copy."""
        return self.frozen_used

    def used_blocks(self) -> UsedBlocks:
        """Return what is in use now."""
        in_use = ExtentSet.from_pairs((i * BLOCK, BLOCK) for i, used in enumerate(self.used) if used)
        return UsedBlocks(in_use if self.method != WHOLE else ExtentSet.whole(len(self.content)), self.method)


class Tracker:
    """Sees every write; may lose what it saw, and then says so; may be told to lie, and then does not."""

    def __init__(self) -> None:
        self.session = 1
        self.generations: list[list[tuple[int, int]]] = []
        self.hides: tuple[int, int] | None = None
        self.released: list[str] = []

    def saw(self, offset: int, length: int) -> None:
        for generation in self.generations:
            generation.append((offset, length))

    def forget(self) -> None:
        """Be restarted: nothing seen so far counts any more."""
        self.session += 1
        self.generations = []

    @hookimpl
    def blockferry_checkpoint(self, snapshot: str) -> Checkpoint:
        self.generations.append([])
        state = {"session": self.session, "generation": len(self.generations) - 1}
        return Checkpoint("simulated", snapshot, state, keep=3)

    @hookimpl
    def blockferry_changed_extents(self, since: Checkpoint, declined: Callable[[str], None]) -> ChangedBlocks | None:
        if since.state["session"] != self.session:
            declined("simulated: it was restarted")
            return None
        assert since.snapshot not in self.released, "a checkpoint that was released is never asked for"
        seen = ExtentSet.from_pairs(self.generations[since.state["generation"]])
        if self.hides:
            seen = seen.difference(ExtentSet.from_pairs([self.hides]))
        return ChangedBlocks(seen, "simulated")

    @hookimpl
    def blockferry_release_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.released.append(checkpoint.snapshot)


@dataclasses.dataclass
class _Archive:
    snapshot: Snapshot
    record: Record
    block_map: BlockMap
    chunks: dict[int, bytes]


class MemoryRepository:
    """Chunks in a dictionary for each snapshot. Strict: what a map says is not there cannot be read."""

    reference = named = "memory:"

    def __init__(self, capabilities: frozenset[str], unit: int) -> None:
        self.capabilities = capabilities
        self._unit = unit
        self.archives: dict[str, _Archive] = {}
        self.unusable: set[str] = set()

    def unit(self, _size: int) -> int:
        return self._unit

    def store(
        self,
        source: BaseLayer,
        block_map: BlockMap,
        record: Record,
        *,
        bases: Sequence[Base],
        advance: Callable[[int], None],
    ) -> Stored:
        """Store chunk by chunk, each from where the plan says."""
        assert len(bases) <= (1 if "merge" not in self.capabilities else len(bases))
        assert not bases or "reuse" in self.capabilities
        chunks: dict[int, bytes] = {}
        for start, length, kind in plan(block_map, record, bases):
            for offset in range(start, start + length, self._unit):
                size = min(self._unit, record.size - offset)
                if kind is Kind.DATA:
                    buffer = bytearray(size)
                    source.read_into(offset, memoryview(buffer))
                    chunks[offset] = bytes(buffer)
                    advance(size)
                elif kind is Kind.SAME:
                    (base,) = [each for each in bases if each.extents.covers(offset, offset + size)]
                    if base.snapshot.id in self.unusable:
                        raise BaseUnusableError("the base was repaired")
                    chunks[offset] = self.archives[base.snapshot.id].chunks[offset]
        snapshot = Snapshot.of(record, f"archive-{record.snapshot}")
        self.archives[snapshot.id] = _Archive(snapshot, record, block_map, chunks)
        return Stored(snapshot, sum(map(len, chunks.values())))

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        return sorted((each.snapshot for each in self.archives.values()), key=lambda each: each.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        archive = self.archives[snapshot.id]
        return Record.from_json(archive.record.to_json(), "memory"), BlockMap.from_bytes(archive.block_map.to_bytes())

    def open(self, snapshot: Snapshot) -> BaseLayer:
        return _Image(self.archives[snapshot.id], self._unit)

    def extract(self, snapshot: Snapshot) -> bytes:
        """Return what the stock tool restores: the image's chunks, and zeros."""
        archive = self.archives[snapshot.id]
        zeros = bytes(self._unit)
        pieces = [archive.chunks.get(offset, zeros) for offset in range(0, archive.record.size, self._unit)]
        return b"".join(pieces)[: archive.record.size]

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        for each in snapshots:
            del self.archives[each.id]

    def close(self) -> None:
        """Nothing is held."""


class _Image(BaseLayer):
    def __init__(self, archive: _Archive, unit: int) -> None:
        self.archive = archive
        self.unit = unit
        self.size = archive.record.size
        self.extents = archive.block_map.extents(*archive.record.stored_kinds)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for start, length in self.extents.clip(offset, offset + len(buffer)):
            for place in range(start, start + length):
                chunk = place // self.unit * self.unit
                if chunk not in self.archive.chunks:
                    raise DamagedSnapshotError(f"the chunk at {chunk} is missing")
                buffer[place - offset] = self.archive.chunks[chunk][place - chunk]
