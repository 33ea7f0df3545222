"""Where in a group's image each byte of its files is: packed, so that reading the image is reading the disk in order.

    small files, by their place on the disk | large files, each on chunks of its own | read beside | late | table

Of small files the image has what the disk has, run after run, and so what several files share (reflinks) once. A large
file begins on a chunk and lies there as it reads: written to again, most of its chunks come out the same, wherever it
then lies. A further backup leaves what did not change where it was in the image of the one before, whose chunks are
taken over, and puts what is new behind it: a thousand new files are a few new chunks. When half of what is taken over
is not in use any more, everything is packed anew.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from blockferry.blockmap import BlockMap
from blockferry.extents import ExtentSet
from blockferry.groups.table import BESIDE, EXTENT, FileTable
from blockferry.groups.walk import Walked

RUN = np.dtype([("place", "<i8"), ("length", "<i8"), ("address", "<i8"), ("row", "<i8"), ("logical", "<i8")])
"""What is to be read for a stretch of the image: the volume at an address, or, BESIDE, a row's file at an offset."""

_SEGMENT = np.dtype([("address", "<i8"), ("length", "<i8"), ("place", "<i8")])
"""A stretch of the volume, and where in the image it is."""

_LATE_SHARE, _MOST_LATE = 64, 64 << 20
"""Room for files that change while they are read: this part of what is new, at most so many bytes."""
_SPARE_EXTENTS = 1024
_WASTE_THAT_COUNTS = 64 << 20
_SPARSE = 2

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A group's image before it is read."""

    table: FileTable
    runs: npt.NDArray[np.void]
    """RUN, by place: everything that is to be read."""
    block_map: BlockMap
    read: ExtentSet
    """What of the image is read from the volume or from files."""
    late: tuple[int, int]
    """Where there is room for what is read again, and how much."""
    table_place: tuple[int, int]
    wasteful: bool
    """So much of what is taken over is not in use any more that the next backup should pack anew."""


def pack(
    walked: Walked, base: FileTable | None, base_size: int, unit: int, unchanged: ExtentSet | None = None
) -> Packed:
    """Return the image of what was walked, over that of the snapshot whose files are `known` in it, if there is one.

    `unit` is the size of the repository's chunks. `unchanged` are the bytes of the volume of which it is known that
    nobody wrote to them since that snapshot: whatever it has from there is taken over too.
    """
    rows, pieces = own_pieces(walked)
    kept_rows, kept = _kept(walked, base)
    still = _still_there(base, unchanged) if base and unchanged else np.empty(0, _SEGMENT)
    taken = _touched(still, pieces)
    places = np.concatenate([kept["place"], taken["place"]])
    same = ExtentSet.from_ranges(places, places + np.concatenate([kept["length"], taken["length"]]))
    begin = _up(same.end, unit) if same else 0
    (new_rows, new), runs, end = _place(walked, rows, pieces, taken, begin, unit)
    table = _table(walked, np.concatenate([kept_rows, new_rows]), np.concatenate([kept, new]))

    fresh = ExtentSet.from_ranges(runs["place"], runs["place"] + runs["length"])
    late = (_up(end, unit), _up(min(_MOST_LATE, fresh.total // _LATE_SHARE), unit) or unit)
    table_place = (sum(late), table.stored_size + _SPARE_EXTENTS * EXTENT.itemsize)
    end = sum(table_place)
    size = base_size if end <= base_size else _up(2 * end, unit)
    whole = fresh.union(ExtentSet.from_pairs([late, table_place]))
    held = same.align(unit, size).total
    return Packed(
        table,
        runs,
        BlockMap.build(size, data=whole, same=same),
        fresh,
        late,
        table_place,
        held - same.total > max(same.total, _WASTE_THAT_COUNTS),
    )


def own_pieces(walked: Walked) -> tuple[Rows, npt.NDArray[np.void]]:
    """Return the row of each piece of a file that is not a further hard link, and the pieces, adjoining ones joined."""
    rows = np.repeat(np.arange(walked.entries.size), np.diff(walked.piece_ends, prepend=0))
    own = walked.entries["link"][rows] < 0
    rows, pieces = rows[own], walked.pieces[own]
    if not rows.size:
        return rows, pieces
    ends, after = pieces["logical"] + pieces["length"], pieces["address"] + pieces["length"]
    beside = pieces["address"] == BESIDE
    adjoins = (rows[1:] == rows[:-1]) & (pieces["logical"][1:] == ends[:-1]) & (beside[1:] == beside[:-1])
    adjoins &= beside[1:] | (pieces["address"][1:] == after[:-1])
    first = np.flatnonzero(np.append(True, ~adjoins))
    joined = pieces[first].copy()
    joined["length"] = ends[np.append(first[1:], rows.size) - 1] - joined["logical"]
    return rows[first], joined


def _kept(walked: Walked, base: FileTable | None) -> tuple[Rows, npt.NDArray[np.void]]:
    """Return the extents of the files that are as they were, with their rows."""
    rows = np.flatnonzero((walked.known >= 0) & (walked.entries["link"] < 0))
    if base is None or not rows.size:
        return np.empty(0, np.int64), np.empty(0, EXTENT)
    then = walked.known[rows]
    ends = base.extent_ends[then]
    counts = ends - np.where(then > 0, base.extent_ends[then - 1], 0)
    steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), base.extents[np.repeat(ends - counts, counts) + steps]


def _still_there(base: FileTable, unchanged: ExtentSet) -> npt.NDArray[np.void]:
    """Return which bytes of the volume are in the base's image as they are now, SEGMENT each, by address."""
    sound = np.repeat(base.entries["flags"] == 0, np.diff(base.extent_ends, prepend=0))
    extents = base.extents[sound & (base.extents["address"] != BESIDE)]
    extents = extents[np.argsort(extents["address"], kind="stable")]
    ends = np.maximum.accumulate(np.append(0, extents["address"] + extents["length"]))[:-1]
    extents = extents[extents["address"] >= ends]  # of what several files share, once is enough
    return _cut(extents["address"], extents["length"], extents["place"], unchanged)


def _touched(still: npt.NDArray[np.void], pieces: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return those of the segments, cut, that pieces of files lie on."""
    on_disk = pieces[pieces["address"] != BESIDE]
    disk = ExtentSet.from_ranges(on_disk["address"], on_disk["address"] + on_disk["length"])
    return _cut(still["address"], still["length"], still["place"], disk)


def _cut(addresses: Rows, lengths: Rows, places: Rows, wanted: ExtentSet) -> npt.NDArray[np.void]:
    """Return what of disjoint segments, sorted by address, lies in an extent set."""
    if not addresses.size or not wanted:
        return np.empty(0, _SEGMENT)
    cuts = np.unique(np.concatenate([addresses, addresses + lengths, wanted.starts, wanted.ends]))
    starts, ends = cuts[:-1], cuts[1:]
    which = np.searchsorted(addresses, starts, side="right") - 1
    extent = np.searchsorted(wanted.starts, starts, side="right") - 1
    inside = (which >= 0) & (extent >= 0)
    inside &= (starts < (addresses + lengths)[which]) & (starts < wanted.ends[extent])
    found = np.empty(int(inside.sum()), _SEGMENT)
    found["address"], found["length"] = starts[inside], (ends - starts)[inside]
    found["place"] = places[which[inside]] + starts[inside] - addresses[which[inside]]
    return found


def _place(
    walked: Walked, rows: Rows, pieces: npt.NDArray[np.void], taken: npt.NDArray[np.void], begin: int, unit: int
) -> tuple[tuple[Rows, npt.NDArray[np.void]], npt.NDArray[np.void], int]:
    """Return the extents of the pieces, with their rows, what is to be read for them, and where in the image that ends.

    What is `taken` has its place already; everything else is placed from `begin` on.
    """
    large = _on_their_own(walked, rows, pieces, taken, unit)
    beside = pieces["address"] == BESIDE
    tight = ~large & ~beside
    disk = ExtentSet.from_ranges(pieces["address"][tight], pieces["address"][tight] + pieces["length"][tight])
    new = disk.difference(ExtentSet.from_ranges(taken["address"], taken["address"] + taken["length"]))
    segments = np.empty(len(new), _SEGMENT)
    segments["address"], segments["length"] = new.starts, new.ends - new.starts
    segments["place"] = begin + np.cumsum(segments["length"]) - segments["length"]
    end = begin + new.total
    every = np.concatenate([taken, segments])
    tight_rows, tight_extents = _along(rows[tight], pieces[tight], every[np.argsort(every["address"], kind="stable")])

    others = np.empty(int((~tight).sum()), EXTENT)
    for column in ("logical", "length", "address"):
        others[column] = pieces[column][~tight]
    other_rows, own = rows[~tight], large[~tight]
    if own.any():
        files, first, which = np.unique(other_rows[own], return_index=True, return_inverse=True)
        order = np.argsort(others["address"][own][first], kind="stable")
        room = _up_each(walked.entries["size"][files], unit)[order]
        starts = np.empty(files.size, np.int64)
        starts[order] = _up(end, unit) + np.cumsum(room) - room
        others["place"][own] = starts[which] + others["logical"][own]
        end = _up(end, unit) + int(room.sum())
    lengths = others["length"][~own]
    others["place"][~own] = end + np.cumsum(lengths) - lengths
    end += int(lengths.sum())
    runs = np.concatenate([_runs(segments, -1, 0), _runs(others, other_rows, others["logical"])])
    extents = np.concatenate([tight_extents, others])
    return (np.concatenate([tight_rows, other_rows]), extents), runs[np.argsort(runs["place"], kind="stable")], end


def _along(
    rows: Rows, pieces: npt.NDArray[np.void], segments: npt.NDArray[np.void]
) -> tuple[Rows, npt.NDArray[np.void]]:
    """Return pieces that lie on segments of the volume, sorted by address, as extents: one for each they touch."""
    starts, ends = segments["address"], segments["address"] + segments["length"]
    first = np.searchsorted(ends, pieces["address"], side="right")
    counts = np.searchsorted(starts, pieces["address"] + pieces["length"], side="left") - first
    which = np.repeat(np.arange(rows.size), counts)
    segment = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(which.size)
    begin = np.maximum(pieces["address"][which], starts[segment])
    found = np.empty(which.size, EXTENT)
    found["address"] = begin
    found["length"] = np.minimum((pieces["address"] + pieces["length"])[which], ends[segment]) - begin
    found["logical"] = pieces["logical"][which] + begin - pieces["address"][which]
    found["place"] = segments["place"][segment] + begin - starts[segment]
    return rows[which], found


def _runs(of: npt.NDArray[np.void], row: Rows | int, logical: Rows | int) -> npt.NDArray[np.void]:
    """Return what is to be read for segments or extents."""
    runs = np.empty(of.size, RUN)
    for column in ("place", "length", "address"):
        runs[column] = of[column]
    runs["row"], runs["logical"] = row, logical
    return runs


def _on_their_own(
    walked: Walked, rows: Rows, pieces: npt.NDArray[np.void], taken: npt.NDArray[np.void], unit: int
) -> npt.NDArray[np.bool_]:
    """Tell which pieces are of large files that share no block with others, and are not mostly holes or taken over."""
    sizes = walked.entries["size"]
    has = np.bincount(rows, pieces["length"], minlength=sizes.size)
    large = (sizes >= unit) & (has * _SPARSE >= sizes)
    on_disk = np.flatnonzero(pieces["address"] != BESIDE)
    order = on_disk[np.argsort(pieces["address"][on_disk], kind="stable")]
    ends = np.maximum.accumulate(pieces["address"][order] + pieces["length"][order])
    shared = np.flatnonzero(pieces["address"][order][1:] < ends[:-1])
    for touched in (order[shared], order[shared + 1]):
        large[rows[touched]] = False
    first = np.searchsorted(taken["address"] + taken["length"], pieces["address"][on_disk], side="right")
    after = np.searchsorted(taken["address"], (pieces["address"] + pieces["length"])[on_disk], side="left")
    large[rows[on_disk[after > first]]] = False
    result: npt.NDArray[np.bool_] = large[rows]
    return result


def _table(walked: Walked, rows: Rows, extents: npt.NDArray[np.void]) -> FileTable:
    """Return the table of all files, with their extents."""
    order = np.lexsort((extents["logical"], rows))
    counts = np.bincount(rows, minlength=walked.entries.size)
    ends = np.cumsum(counts).astype(np.int64)
    return FileTable(walked.entries, walked.names, walked.name_ends, extents[order], ends, walked.texts)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _up_each(numbers: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.int64]:
    up: npt.NDArray[np.int64] = -(-numbers // unit) * unit
    return up
