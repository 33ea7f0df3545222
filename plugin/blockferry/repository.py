"""The contract between the two roads and a repository adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet

if TYPE_CHECKING:
    from blockferry.layers import Layer
    from blockferry.snapshot import Record, Snapshot, Stored

Advance = Callable[[int], None]
"""Called with how many bytes of the map's data, on the repository's grid, were dealt with since the last call."""


EXPORTED = "export:"
"""What is in the place of a repository's reference where another tool's job stores."""


@dataclasses.dataclass(frozen=True)
class Base:
    """An earlier snapshot, and which chunks of its image a new one takes over: whole ones, on the repository's grid."""

    snapshot: Snapshot
    extents: ExtentSet


def plan(block_map: BlockMap, record: Record, bases: Sequence[Base]) -> BlockMap:
    """Return the map of the chunks that an image is stored in: data is read, same comes from a base, zero is left out.

    A part takes nothing over: its bases are only looked at, whether they are sound.

    Raise ValueError if a chunk of what is to be a whole image would be left out though the map has it as the same.
    """
    grid = block_map.on_grid(record.unit)
    same = grid.extents(Kind.SAME)
    if record.part:
        return BlockMap.build(grid.size, data=grid.extents(Kind.DATA))
    reused = same.intersection(ExtentSet.empty().union(*(base.extents for base in bases)))
    if reused != same:
        raise ValueError("the bases do not have all that is the same")
    return BlockMap.build(grid.size, data=grid.extents(Kind.DATA), same=reused)


class Snapshots(Protocol):
    """Where snapshots are listed and described. Used from one thread; errors are RepositoryError and its kinds."""

    reference: str
    """Without credentials, and the same in whatever way the repository is named."""

    def unit(self, size: int) -> int:
        """Return the size, in bytes, of the chunks or segments that an image of `size` bytes is stored in."""

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return every complete snapshot that blockferry wrote here, oldest first.

        Whoever is about to store something may get the list before the repository's key was tried: storing tries it.
        """

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot; DamagedSnapshotError if they cannot be read."""


class Repository(Snapshots, Protocol):
    """A borg or restic repository that holds snapshots.

    A message never holds a credential. Nothing is retried here beyond what the repository's own tool retries.
    """

    named: str
    """The reference by which any process with our environment can open it again."""
    capabilities: frozenset[str]
    """`reuse`: chunks of a base cost no read; `merge`: of several bases. `concurrent`: several writers at once.
    `parallel`: a layer serves several reads at the same time, also while `store` runs, and more may be opened, by any
    thread; else one after the other."""

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Store an image of which `block_map` says what every byte is, with its record, as one snapshot.

        `plan` says what becomes of each chunk: those with any `data` byte are read whole from `source`, others are
        taken from `bases`. All or nothing: after an error there is no snapshot, and no process, mount or lock is
        left. Raise BaseUnusableError if a base does not have its chunks any more.
        """

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image for random access. Every byte is authenticated by the repository's own means.

        The layer's extents are what the image itself has, `Record.stored_kinds`; DamagedSnapshotError if the archive
        lacks any of it. `blockferry.chain` traces a part back to what it lies on.
        """

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots; space is freed by the repository's own tool (borg compact, restic prune)."""

    def close(self) -> None:
        """Let go of processes and locks. Closing twice is allowed."""
