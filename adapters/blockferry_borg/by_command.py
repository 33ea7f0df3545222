"""What the two ways that use the `borg` command share: listing, reading back, and never showing what is not whole.

An archive is made under its name with `.checkpoint` at the end, as borg calls what is unfinished, and gets its own
name when borg has ended without so much as a warning: whatever dies before that leaves no snapshot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from blockferry.blockmap import BlockMap
from blockferry.errors import BlockferryError, DamagedSnapshotError, ToolMissingError
from blockferry.layers import Layer
from blockferry.repository import Advance
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot
from blockferry_borg.archives import IMAGE_NAME, is_unfinished, map_from, snapshot_from, unit_for
from blockferry_borg.command import Borg, Running
from blockferry_borg.extracted import ExtractedImage, MountedImage
from blockferry_borg.layer import MAP_LIMIT, RECORD_LIMIT
from blockferry_borg.tree import LayerTree

_TICK = 0.5
"""Seconds between two reports of progress."""


class Words(Protocol):
    """How a series of borg wants to be told things: the arguments of its commands."""

    def list_archives(self) -> list[str]:
        """Print the archives, with their comments, as JSON."""

    def extract(self, archive: str, item: str) -> list[str]:
        """Print an item's bytes."""

    def mount(self, archive: str) -> list[str]:
        """Mount an archive, in the foreground; the mount point follows."""

    def rename(self, archive: str, name: str) -> list[str]:
        """Give an archive another name."""

    def delete(self, archive: str) -> list[str]:
        """Delete an archive."""

    def described_in(self, archive: str) -> str:
        """Return the archive that has the record and the map of the image in `archive`."""


class CommandRepository:
    """Implements all of `blockferry.repository.Repository` but `store`."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, borg: Borg, words: Words) -> None:
        self.reference = self.named = borg.where
        self.borg = borg
        self.words = words

    def unit(self, size: int) -> int:
        """Return the size of the chunks that an image of `size` bytes is stored in."""
        return unit_for(size)

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return every complete snapshot, oldest first."""
        listed = self.borg.listing(*self.words.list_archives())["archives"]
        whole = [entry for entry in listed if not is_unfinished(entry["name"])]
        found = [snapshot_from(entry["name"], entry.get("comment") or "") for entry in whole]
        return sorted((snapshot for snapshot in found if snapshot), key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot."""
        where = f"{self.reference}::{snapshot.archive}"
        record = Record.from_json(self._extract(snapshot, RECORD_NAME, RECORD_LIMIT), where)
        block_map = map_from(self._extract(snapshot, MAP_NAME, MAP_LIMIT), where)
        if block_map.size != record.size:
            raise DamagedSnapshotError(
                f"{where}: the map is of {block_map.size} bytes, the record of {record.size}",
                remedy="Check it with `borg check`.",
            )
        return record, block_map

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image, mounted if this borg can mount: while it is, nobody can write to the repository."""
        record, block_map = self.describe(snapshot)
        extents = block_map.extents(*record.stored_kinds)
        name = f"{self.reference}::{snapshot.archive}"
        try:
            mounted = self.borg.mount(*self.words.mount(snapshot.archive), item=IMAGE_NAME)
            return MountedImage(name, extents, record.size, mounted)
        except ToolMissingError:
            arguments = self.words.extract(snapshot.archive, IMAGE_NAME)
            return ExtractedImage(name, extents, record.size, lambda: self.borg.start(*arguments, piped=True))

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots, one after the other; those that are not there need no deleting."""
        there = {snapshot.archive for snapshot in self.snapshots()} if snapshots else set()
        for archive in dict.fromkeys(snapshot.archive for snapshot in snapshots):
            if archive in there:
                self.borg.run(*self.words.delete(archive))
                if self.words.described_in(archive) != archive:
                    self.borg.run(*self.words.delete(self.words.described_in(archive)))

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _extract(self, snapshot: Snapshot, item: str, limit: int) -> bytes:
        """Return a small item of a snapshot, or DamagedSnapshotError if it is not there or larger than `limit`."""
        arguments = self.words.extract(self.words.described_in(snapshot.archive), item)
        with self.borg.start(*arguments, piped=True) as running:
            assert running.pipe  # noqa: S101  # it was asked for
            content = running.pipe.read(limit + 1)
            if len(content) <= limit:
                running.wait()
                running.check(warnings_are_errors=True)
                return content
        raise DamagedSnapshotError(
            f"{self.reference}::{snapshot.archive}: {item} has more than {limit} bytes",
            remedy="Check it with `borg check`.",
        )


def follow(running: Running, tree: LayerTree, advance: Advance, total: int) -> None:
    """Wait until borg has read a tree; raise what the tree's layers failed with, or what borg did.

    `advance` is called with counts that add up to `total`, the bytes of the image that are to be read.
    """
    tree.on_failure = running.interrupt
    told = 0
    while not running.wait(_TICK):
        # The kernel may read a page twice.
        served = min(tree.served, total)
        advance(served - told)
        told = served
    if tree.failure is not None:
        raise tree.failure
    running.check(warnings_are_errors=True)
    advance(total - told)


@contextlib.contextmanager
def removed_on_failure(repository: CommandRepository, *archives: str) -> Iterator[None]:
    """Delete archives, if they were made at all, should the context fail."""
    try:
        yield
    except BaseException:
        for archive in archives:
            with contextlib.suppress(BlockferryError):
                repository.borg.run(*repository.words.delete(archive))
        raise
