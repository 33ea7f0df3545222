"""Reading the blocks of an ext filesystem: as they lie on the disk, or as something else says that they are."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from blockferry.extents import Offsets
from blockferry.layers import Layer
from blockferry.used.checksum import Rows
from blockferry.used.ext4.superblock import SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Layout, UnanswerableError


class Relocation(Protocol):
    """What says that blocks are to be read elsewhere: a journal that has not been replayed."""

    def places(self, blocks: Offsets) -> Offsets:
        """Return the block in which each of `blocks` is to be read."""

    def mend(self, blocks: Offsets, rows: Rows) -> None:
        """Undo, in what was read for `blocks`, what it takes to keep a block elsewhere."""


class BlockReader:
    """The blocks of a filesystem, as they lie on the disk or as `relocation` says."""

    def __init__(self, layer: Layer, layout: Layout, relocation: Relocation | None = None) -> None:
        self.layer = layer
        self.layout = layout
        self.relocation = relocation

    def read(self, blocks: Offsets) -> Rows:
        """Return the blocks as rows of bytes; neighbours in the list that are neighbours on disk are read together.

        Raise UnanswerableError for a block that the filesystem does not have.
        """
        rows = np.empty((blocks.size, self.layout.block_size), np.uint8)
        if not blocks.size:
            return rows
        places = self.relocation.places(blocks) if self.relocation else blocks
        if int(places.min()) < 0 or int(places.max()) >= self.layout.blocks:
            raise UnanswerableError("metadata lies outside the filesystem")
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), blocks.size], strict=True):
            self.layer.read_into(int(places[first]) * self.layout.block_size, rows[first:last].reshape(-1).data)
        if self.relocation:
            self.relocation.mend(blocks, rows)
        return rows

    def superblock(self) -> bytes:
        """Return the superblock's 1,024 bytes."""
        block, offset = divmod(SUPERBLOCK_OFFSET, self.layout.block_size)
        return self.read(np.array([block]))[0, offset : offset + SUPERBLOCK_SIZE].tobytes()
