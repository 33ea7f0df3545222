"""Pieces of an export that are hashed, to be compared by the next one where a tracker says that nothing changed.

A backup compares such a sample with the earlier snapshot; of an export nobody here can read what was stored. Where the
pieces are is drawn anew each time: no tracker can know them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from blockferry.blockmap import BlockMap, Kind
from blockferry.difference import pieces
from blockferry.errors import TrackerError
from blockferry.export.memory import Shown
from blockferry.layers import Layer

PIECE = 64 << 10
"""Bytes of a piece: small, for only one of which nothing has changed can be compared."""
COUNT = 64


def draw(layer: Layer) -> Iterator[tuple[int, int, str]]:
    """Yield start, length and hash of some pieces of what a layer has."""
    for start, length in pieces(layer.extents, COUNT, PIECE):
        yield start, length, _hash(layer, start, length)


def compare(layer: Layer, before: Shown, now: BlockMap) -> int:
    """Compare the pieces of which all is said to be as before; return their bytes.

    Raise TrackerError if one differs.
    """
    used = before.block_map.extents(Kind.DATA, Kind.SAME)
    data, same = now.extents(Kind.DATA), now.extents(Kind.SAME)
    compared = 0
    for start, length, digest in before.witnesses:
        end = start + length
        if not 0 <= start < end <= now.size or data.clip(start, end):
            continue
        if same.clip(start, end) != used.clip(start, end):
            continue
        if _hash(layer, start, length) != digest:
            raise TrackerError(
                f"{length} bytes at {start} are said not to have changed, and differ from the earlier export",
                remedy="Nothing is exported, and the tracker is not asked again: at the next export everything counts "
                "as changed. What the last jobs stored may lack changes too.",
            )
        compared += length
    return compared


def _hash(layer: Layer, start: int, length: int) -> str:
    buffer = memoryview(bytearray(length))
    layer.read_into(start, buffer)
    return hashlib.blake2b(buffer, digest_size=16).hexdigest()
