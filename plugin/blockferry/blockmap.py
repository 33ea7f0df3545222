"""What a backup has to know of every byte of a volume: read it, leave it out, or take it from the base.

A `BlockMap` covers `[0, size)` without a gap by runs of one of three kinds. It is the run format of borg 2's input
maps (`START LENGTH data|zero|same`, a line a run, contiguous from 0; borg's documentation, "borg create --map")
and, by another name, of NBD block status.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets

Kinds = npt.NDArray[np.uint8]


class Kind(enum.IntEnum):
    """What a run of bytes is. The values are part of the stored form."""

    ZERO = 0
    """Not in use: reads as zeros after a restore."""
    DATA = 1
    """In use: read from the source."""
    SAME = 2
    """In use and as it is in the base snapshot."""


class BlockMap:
    """Runs `[boundaries[i], boundaries[i + 1])` of kind `kinds[i]`; neighbours differ; immutable."""

    __slots__ = ("boundaries", "kinds")

    def __init__(self, boundaries: Offsets, kinds: Kinds) -> None:
        """Take `len(kinds) + 1` boundaries from 0 to the size; neighbouring runs of one kind are joined.

        Raise ValueError if the runs do not cover the volume contiguously from 0.
        """
        if boundaries.size != kinds.size + 1 or boundaries[0] != 0 or bool((np.diff(boundaries) <= 0).any()):
            raise ValueError("a block map's runs must be contiguous from 0 and not empty")
        fresh = np.concatenate([np.ones(min(kinds.size, 1), bool), kinds[1:] != kinds[:-1]])
        self.kinds = kinds[fresh]
        self.boundaries = np.concatenate([boundaries[:-1][fresh], boundaries[-1:]])

    @classmethod
    def build(cls, size: int, *, data: ExtentSet, same: ExtentSet | None = None) -> BlockMap:
        """Return the map of `size` bytes with `data` to read, `same` as in the base, and the rest zero.

        A byte in both is data: reading more is always right.
        """
        data = data.clip(0, size)
        same = (same or ExtentSet.empty()).clip(0, size).difference(data)
        edges = np.unique(np.concatenate([[0, size], data.starts, data.ends, same.starts, same.ends])).astype(np.int64)
        kinds = np.full(edges.size - 1, Kind.ZERO, np.uint8)
        for extents, kind in ((data, Kind.DATA), (same, Kind.SAME)):
            if extents:
                index = np.searchsorted(extents.starts, edges[:-1], side="right") - 1
                inside = (index >= 0) & (edges[:-1] < extents.ends[index])
                kinds[inside] = kind
        return cls(edges, kinds)

    def __len__(self) -> int:
        return int(self.kinds.size)

    def __iter__(self) -> Iterator[tuple[int, int, Kind]]:
        """Yield `(start, length, kind)`, in order."""
        lengths = np.diff(self.boundaries).tolist()
        for start, length, kind in zip(self.boundaries[:-1].tolist(), lengths, self.kinds.tolist(), strict=True):
            yield start, length, Kind(kind)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMap):
            return NotImplemented
        return np.array_equal(self.boundaries, other.boundaries) and np.array_equal(self.kinds, other.kinds)

    __hash__ = None  # type: ignore[assignment]  # arrays are compared, never used as keys

    @property
    def size(self) -> int:
        """The bytes that the map covers."""
        return int(self.boundaries[-1])

    def extents(self, *kinds: Kind) -> ExtentSet:
        """Return the bytes whose run is of one of the kinds."""
        chosen = np.isin(self.kinds, np.array(kinds, np.uint8))
        return ExtentSet.from_ranges(self.boundaries[:-1][chosen], self.boundaries[1:][chosen])

    def on_grid(self, unit: int) -> BlockMap:
        """Return the map of whole chunks of `unit` bytes that a repository stores.

        A chunk with any byte to read is data, else one with any byte from the base is same, else it is zero.
        """
        return BlockMap.build(
            self.size,
            data=self.extents(Kind.DATA).align(unit, self.size),
            same=self.extents(Kind.SAME).align(unit, self.size),
        )

    def to_lines(self) -> str:
        """Return borg 2's map text."""
        return "".join(f"{start} {length} {kind.name.lower()}\n" for start, length, kind in self)

    @classmethod
    def from_lines(cls, text: str) -> BlockMap:
        """Return the map of borg 2's map text; raise ValueError, with the line's number, where it is not one."""
        boundaries, kinds = [0], []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                start, length, kind = line.split()
                kinds.append(Kind[kind.upper()])
                if int(start) != boundaries[-1] or int(length) <= 0:
                    raise ValueError
                boundaries.append(int(start) + int(length))
            except (ValueError, KeyError):
                raise ValueError(f"line {number} of the block map is not the next run: {line[:80]!r}") from None
        return cls(np.array(boundaries, np.int64), np.array(kinds, np.uint8))

    def to_bytes(self) -> bytes:
        """Return the stored form: a line `blockferry map 1`, then in zlib all lengths (u64 LE) and all kinds (u8)."""
        lengths = np.diff(self.boundaries).astype("<u8")
        return _MAGIC + zlib.compress(lengths.tobytes() + self.kinds.tobytes(), 1)

    @classmethod
    def from_bytes(cls, stored: bytes) -> BlockMap:
        """Return the map of the stored form; raise ValueError if it is damaged."""
        if not stored.startswith(_MAGIC):
            raise ValueError("not a block map of a known version")
        inflate = zlib.decompressobj()
        try:
            plain = inflate.decompress(stored[len(_MAGIC) :], _LARGEST)
        except zlib.error as error:
            raise ValueError(f"the block map is damaged: {error}") from None
        if not inflate.eof:
            raise ValueError("the block map is cut short, or larger than any that is true")
        count, rest = divmod(len(plain), 9)
        if rest:
            raise ValueError("the block map is cut short")
        lengths = np.frombuffer(plain, "<u8", count).astype(np.int64)
        kinds = np.frombuffer(plain, np.uint8, count, count * 8)
        if bool((kinds > max(Kind)).any()) or bool((lengths <= 0).any()):
            raise ValueError("the block map holds a run of no known kind or length")
        return cls(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), kinds)


_MAGIC = b"blockferry map 1\n"

_LARGEST = 9 * 100_000_000
"""Bytes that a map may take: a hundred million runs. What a repository holds does not decide how much memory we use."""
