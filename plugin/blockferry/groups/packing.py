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
import stat

import numpy as np
import numpy.typing as npt

from blockferry.blockmap import BlockMap
from blockferry.extents import ExtentSet
from blockferry.groups.table import BESIDE, EXTENT, FileTable
from blockferry.groups.walk import Walked

RUN = np.dtype([("place", "<i8"), ("length", "<i8"), ("address", "<i8"), ("row", "<i8"), ("logical", "<i8")])
"""What is to be read for a stretch of the image: the volume at an address, or, BESIDE, a row's file at an offset."""

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


def pack(walked: Walked, base: FileTable | None, base_size: int, unit: int) -> Packed:
    """Return the image of what was walked, over that of the snapshot whose files are `known` in it, if there is one.

    `unit` is the size of the repository's chunks.
    """
    rows, pieces = own_pieces(walked)
    kept_rows, kept = _kept(walked, base)
    same = ExtentSet.from_ranges(kept["place"], kept["place"] + kept["length"])
    begin = _up(same.end, unit) if same else 0
    places, runs, end = _place(walked, rows, pieces, begin, unit)
    table = _table(walked, (kept_rows, kept), (rows, pieces, places))

    fresh = ExtentSet.from_ranges(runs["place"], runs["place"] + runs["length"])
    late = (_up(end, unit), _up(min(_MOST_LATE, fresh.total // _LATE_SHARE), unit) or unit)
    table_place = (sum(late), table.stored_size + _SPARE_EXTENTS * EXTENT.itemsize)
    end = sum(table_place)
    size = base_size if end <= base_size else _up(2 * end, unit)
    whole = fresh.union(ExtentSet.from_pairs([late, table_place]))
    taken = same.align(unit, size).total
    return Packed(
        table,
        runs,
        BlockMap.build(size, data=whole, same=same),
        fresh,
        late,
        table_place,
        taken - same.total > max(same.total, _WASTE_THAT_COUNTS),
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


def _place(
    walked: Walked, rows: Rows, pieces: npt.NDArray[np.void], begin: int, unit: int
) -> tuple[Rows, npt.NDArray[np.void], int]:
    """Return where each piece goes in the image from `begin` on, what is to be read for it, and where that ends."""
    places = np.zeros(rows.size, np.int64)
    large = _on_their_own(walked, rows, pieces, unit)
    beside = pieces["address"] == BESIDE
    tight = ~large & ~beside
    disk = ExtentSet.from_ranges(pieces["address"][tight], pieces["address"][tight] + pieces["length"][tight])
    lengths = disk.ends - disk.starts
    begins = begin + np.cumsum(lengths) - lengths
    number = np.searchsorted(disk.starts, pieces["address"][tight], side="right") - 1
    places[tight] = begins[number] + pieces["address"][tight] - disk.starts[number]
    end = begin + disk.total

    runs = [np.zeros(len(disk), RUN)]
    runs[0]["place"], runs[0]["length"], runs[0]["address"], runs[0]["row"] = begins, lengths, disk.starts, -1
    if large.any():
        own = rows[large]
        files, first, which = np.unique(own, return_index=True, return_inverse=True)
        order = np.argsort(pieces["address"][large][first], kind="stable")
        room = _up_each(walked.entries["size"][files], unit)[order]
        starts = np.empty(files.size, np.int64)
        starts[order] = _up(end, unit) + np.cumsum(room) - room
        places[large] = starts[which] + pieces["logical"][large]
        end = _up(end, unit) + int(room.sum())
    small_beside = np.flatnonzero(beside & ~large)
    lengths = pieces["length"][small_beside]
    places[small_beside] = end + np.cumsum(lengths) - lengths
    end += int(lengths.sum())

    rest = np.flatnonzero(large | beside)
    others = np.zeros(rest.size, RUN)
    others["place"], others["row"] = places[rest], rows[rest]
    for column in ("length", "address", "logical"):
        others[column] = pieces[column][rest]
    every = np.concatenate([*runs, others])
    return places, every[np.argsort(every["place"], kind="stable")], end


def _on_their_own(walked: Walked, rows: Rows, pieces: npt.NDArray[np.void], unit: int) -> npt.NDArray[np.bool_]:
    """Tell which pieces are of large files that share no block with others, and are not mostly holes."""
    sizes = walked.entries["size"]
    has = np.bincount(rows, pieces["length"], minlength=sizes.size)
    large = (sizes >= unit) & (has * _SPARSE >= sizes)
    on_disk = np.flatnonzero(pieces["address"] != BESIDE)
    order = on_disk[np.argsort(pieces["address"][on_disk], kind="stable")]
    ends = np.maximum.accumulate(pieces["address"][order] + pieces["length"][order])
    shared = np.flatnonzero(pieces["address"][order][1:] < ends[:-1])
    for touched in (order[shared], order[shared + 1]):
        large[rows[touched]] = False
    result: npt.NDArray[np.bool_] = large[rows]
    return result


def _table(
    walked: Walked, kept: tuple[Rows, npt.NDArray[np.void]], new: tuple[Rows, npt.NDArray[np.void], Rows]
) -> FileTable:
    """Return the table of all files, with the extents that were kept and those that are new."""
    rows, pieces, places = new
    extents = np.empty(rows.size, EXTENT)
    extents["place"] = places
    for column in ("logical", "length", "address"):
        extents[column] = pieces[column]
    every_row, every = np.concatenate([kept[0], rows]), np.concatenate([kept[1], extents])
    order = np.lexsort((every["logical"], every_row))
    counts = np.bincount(every_row, minlength=walked.entries.size)
    return FileTable(
        walked.entries, walked.names, walked.name_ends, every[order], np.cumsum(counts).astype(np.int64), walked.texts
    )


def is_file(entries: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Tell which entries are regular files."""
    found: npt.NDArray[np.bool_] = entries["mode"] & 0o170000 == stat.S_IFREG
    return found


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _up_each(numbers: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.int64]:
    up: npt.NDArray[np.int64] = -(-numbers // unit) * unit
    return up
