"""The contract between the two roads and a repository adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from blockferry.blockmap import BlockMap
    from blockferry.layers import Layer
    from blockferry.snapshot import Record, Snapshot, Stored

Advance = Callable[[int], None]
"""Called with how many bytes of the map's data, on the repository's grid, were dealt with since the last call."""


class Repository(Protocol):
    """A borg or restic repository that holds snapshots.

    Used from one thread. Errors are RepositoryError and its kinds; a message never holds a credential. Nothing is
    retried here beyond what the repository's own tool retries.
    """

    reference: str
    """As the user wrote it, without credentials."""
    capabilities: frozenset[str]
    """`reuse`: `same` runs cost no read. `concurrent`: several writers at once."""

    def unit(self, size: int) -> int:
        """Return the size, in bytes, of the chunks or segments that an image of `size` bytes is stored in."""

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, base: Snapshot | None, advance: Advance
    ) -> Stored:
        """Store an image of which `block_map` says what every byte is, with its record, as one snapshot.

        Chunks with any `data` byte are read whole from `source`. `same` needs `base`. All or nothing: after an
        error there is no snapshot, and no process, mount or lock is left.
        """

    def snapshots(self) -> list[Snapshot]:
        """Return every complete snapshot that blockferry wrote here, oldest first."""

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot; DamagedSnapshotError if they cannot be read."""

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image for random access. Every byte is authenticated by the repository's own means.

        The layer's extents are the data and same bytes of the map; DamagedSnapshotError if the archive lacks any.
        """

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots; space is freed by the repository's own tool (borg compact, restic prune)."""

    def close(self) -> None:
        """Let go of processes and locks. Closing twice is allowed."""
