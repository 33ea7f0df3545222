"""Sets of byte ranges: the currency of everything that is in use, changed, shared or logged.

An `ExtentSet` is two int64 arrays, `starts` and `ends` (half open, in bytes), sorted, disjoint and coalesced: no
two extents touch. Every operation is a few numpy passes over those arrays, so ten million extents cost seconds and
160 MB, and an operation never looks at a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]


class ExtentSet:
    """A sorted, disjoint, coalesced, immutable set of byte ranges `[start, end)`."""

    __slots__ = ("ends", "starts")

    starts: Offsets
    ends: Offsets

    def __init__(self, starts: Offsets, ends: Offsets) -> None:
        """Take arrays that are sorted, disjoint and coalesced already; `from_ranges` takes any others."""
        self.starts = starts
        self.ends = ends

    @classmethod
    def empty(cls) -> ExtentSet:
        """Return the set without any byte."""
        none = np.empty(0, np.int64)
        return cls(none, none)

    @classmethod
    def whole(cls, size: int) -> ExtentSet:
        """Return `[0, size)`."""
        return cls.from_pairs([(0, size)])

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> ExtentSet:
        """Return the set of `(start, length)` pairs in any order, overlapping or not."""
        array = np.array(list(pairs), np.int64).reshape(-1, 2)
        return cls.from_ranges(array[:, 0], array[:, 0] + array[:, 1])

    @classmethod
    def from_ranges(cls, starts: npt.ArrayLike, ends: npt.ArrayLike) -> ExtentSet:
        """Return the set of ranges `[starts[i], ends[i])` in any order, overlapping or not; empty ones are dropped.

        Raise ValueError for a negative start or an end before its start.
        """
        start_array = np.asarray(starts, np.int64)
        end_array = np.asarray(ends, np.int64)
        if start_array.size and (int(start_array.min()) < 0 or bool((end_array < start_array).any())):
            raise ValueError("an extent starts below zero or ends before it starts")
        filled = end_array > start_array
        if not filled.all():
            start_array, end_array = start_array[filled], end_array[filled]
        if start_array.size > 1 and bool((start_array[1:] < start_array[:-1]).any()):
            order = np.argsort(start_array, kind="stable")
            start_array, end_array = start_array[order], end_array[order]
        return cls(*_coalesce(start_array, end_array, 0))

    @classmethod
    def from_bits(cls, bits: npt.NDArray[np.bool_], unit: int, offset: int = 0) -> ExtentSet:
        """Return the extents of the true entries of `bits`, each `unit` bytes long, the first at `offset`."""
        edges = np.flatnonzero(np.diff(bits.astype(np.int8), prepend=0, append=0)).astype(np.int64)
        return cls(edges[0::2] * unit + offset, edges[1::2] * unit + offset)

    def __len__(self) -> int:
        return int(self.starts.size)

    def __bool__(self) -> bool:
        return bool(self.starts.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield `(start, length)`, in order."""
        return zip(self.starts.tolist(), (self.ends - self.starts).tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ends, other.ends)

    __hash__ = None  # type: ignore[assignment]  # arrays are compared, never used as keys

    def __repr__(self) -> str:
        shown = ", ".join(f"{start}+{length}" for start, length in list(self[:4]))
        return f"<ExtentSet {len(self)} extents, {self.total} bytes: {shown}{', ...' if len(self) > 4 else ''}>"

    def __getitem__(self, index: slice) -> ExtentSet:
        """Return the extents at the positions of a slice, as a set."""
        return ExtentSet(self.starts[index], self.ends[index])

    @property
    def total(self) -> int:
        """The number of bytes in the set."""
        return int((self.ends - self.starts).sum())

    @property
    def end(self) -> int:
        """The end of the last extent; 0 for the empty set."""
        return int(self.ends[-1]) if self else 0

    def union(self, *others: ExtentSet) -> ExtentSet:
        """Return the bytes that are in any of the sets."""
        sets = [each for each in (self, *others) if each]
        if len(sets) < 2:
            return sets[0] if sets else self
        return ExtentSet.from_ranges(
            np.concatenate([each.starts for each in sets]), np.concatenate([each.ends for each in sets])
        )

    def complement(self, size: int) -> ExtentSet:
        """Return the bytes of `[0, size)` that are not in the set."""
        inside = self.clip(0, size)
        starts = np.concatenate([np.zeros(1, np.int64), inside.ends])
        ends = np.concatenate([inside.starts, np.array([size], np.int64)])
        filled = ends > starts
        return ExtentSet(starts[filled], ends[filled])

    def intersection(self, other: ExtentSet) -> ExtentSet:
        """Return the bytes that are in both sets."""
        small, large = (self, other) if len(self) <= len(other) else (other, self)
        if not small:
            return ExtentSet.empty()
        # For each extent of the smaller set, the slice of the larger one's extents that overlap it.
        first = np.searchsorted(large.ends, small.starts, side="right")
        count = np.searchsorted(large.starts, small.ends, side="left") - first
        owner = np.repeat(np.arange(len(small)), count)
        within = np.arange(owner.size) - np.repeat(np.cumsum(count) - count, count)
        partner = first[owner] + within
        starts = np.maximum(small.starts[owner], large.starts[partner])
        ends = np.minimum(small.ends[owner], large.ends[partner])
        # Pieces of one extent never touch a neighbour's: both sets are coalesced.
        return ExtentSet(starts, ends)

    def difference(self, other: ExtentSet) -> ExtentSet:
        """Return the bytes of this set that are not in the other."""
        return self.intersection(other.complement(max(self.end, other.end)))

    def clip(self, start: int, end: int) -> ExtentSet:
        """Return the bytes of the set that lie in `[start, end)`."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left"))
        if first >= last or start >= end:
            return ExtentSet.empty()
        return ExtentSet(np.maximum(self.starts[first:last], start), np.minimum(self.ends[first:last], end))

    def shift(self, distance: int) -> ExtentSet:
        """Return the set with every offset moved by `distance` bytes."""
        return ExtentSet(self.starts + distance, self.ends + distance)

    def align(self, unit: int, size: int) -> ExtentSet:
        """Return the set grown outwards to multiples of `unit`, cut at `size`."""
        starts = self.starts // unit * unit
        ends = np.minimum(-(-self.ends // unit) * unit, size)
        return ExtentSet(*_coalesce(starts, ends, 0))

    def coalesce(self, gap: int) -> ExtentSet:
        """Return the set with gaps of at most `gap` bytes between extents filled in."""
        return ExtentSet(*_coalesce(self.starts, self.ends, gap))

    def covers(self, start: int, end: int) -> bool:
        """Tell whether every byte of `[start, end)` is in the set."""
        index = int(np.searchsorted(self.ends, start, side="right"))
        return start >= end or (index < len(self) and int(self.starts[index]) <= start and int(self.ends[index]) >= end)

    def batches(self, most: int) -> Iterator[ExtentSet]:
        """Yield the set in order, in pieces of at most `most` bytes; long extents are cut."""
        if most <= 0:
            raise ValueError("a batch needs room for at least one byte")
        position, index = 0, 0
        while index < len(self):
            start = max(int(self.starts[index]), position)
            # The last extent that ends within `most` bytes of the set's own, counted from `start`.
            before = np.cumsum(self.ends[index : index + 65536] - self.starts[index : index + 65536])
            before -= start - int(self.starts[index])
            fits = int(np.searchsorted(before, most, side="right"))
            room = most - (int(before[fits - 1]) if fits else 0)
            end = int(self.ends[index + fits - 1]) if fits else start
            if index + fits < len(self) and fits < before.size and room > 0:
                end = max(int(self.starts[index + fits]), start) + room
            yield self.clip(start, end)
            position = end
            index = int(np.searchsorted(self.ends, end, side="right"))


def overlaps(sets: Sequence[ExtentSet]) -> ExtentSet:
    """Return the bytes that are in more than one of the sets."""
    starts = np.concatenate([np.empty(0, np.int64), *(each.starts for each in sets)])
    ends = np.concatenate([np.empty(0, np.int64), *(each.ends for each in sets)])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(ends)[:-1]
    twice = starts[1:] < reach
    return ExtentSet.from_ranges(starts[1:][twice], np.minimum(ends[1:], reach)[twice])


def _coalesce(starts: Offsets, ends: Offsets, gap: int) -> tuple[Offsets, Offsets]:
    """Join ranges, sorted by start, that overlap, touch or lie at most `gap` bytes apart."""
    if starts.size < 2:
        return starts, ends
    reach = np.maximum.accumulate(ends)
    fresh = starts[1:] > reach[:-1] + gap
    if fresh.all():
        return starts, ends
    first = np.concatenate([[True], fresh])
    last = np.concatenate([fresh, [True]])
    return starts[first], reach[last]
