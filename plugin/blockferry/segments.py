"""An image as many files, for tools that skip a file that has not changed: names, times and inodes of its segments.

    DDDDDD/OOOOOOOOOOOOOOOO     a segment: its name is its offset in the image, in hexadecimal

A segment is `unit` bytes of the image, the last one what is left; 256 of them share a directory, whose name counts
from 0 in hexadecimal. Segments without a byte in use are left out.

restic takes a file as unchanged, without opening it, if its size, mtime, ctime and inode are those in the parent
snapshot (restic's documentation, "File change detection"); borg if size, inode and either time are those in its files
cache. So a segment's inode is a function of its number, and its mtime and ctime are its version stamp: for data a
value that no other backup uses, for a segment that is as in the base the base's stamp. A directory's times are a
function of what is in it, so equal directories are stored once.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
import zlib

import numpy as np
import numpy.typing as npt

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import BaseUnusableError, DamagedSnapshotError
from blockferry.extents import Offsets

STAMPS_NAME = "blockferry.stamps"
VOLUME_DIRECTORY = "volume"
PER_DIRECTORY = 256

_SMALL_UNIT, _LARGE_UNIT = 4 << 20, 16 << 20
_LARGE_IMAGE = 1 << 40
_MAGIC = b"blockferry stamps 1\n"

Kinds = npt.NDArray[np.uint8]
Stamps = npt.NDArray[np.int64]
"""One for each segment of the image, in ns since the epoch; 0: the segment is left out."""


def unit_for(size: int) -> int:
    """Return the segment size for an image of `size` bytes: more, smaller files cost time, fewer, larger ones space."""
    return _LARGE_UNIT if size > _LARGE_IMAGE else _SMALL_UNIT


def new_stamp() -> int:
    """Return a stamp that no other backup uses: the second is the clock's, the rest of it is drawn."""
    return int(time.time()) * 10**9 + secrets.randbelow(10**9)


def segment_kinds(block_map: BlockMap, unit: int) -> Kinds:
    """Return the kind of each segment, by number."""
    grid = block_map.on_grid(unit)
    first = grid.boundaries[:-1] // unit
    counts = np.diff(np.append(first, segment_count(block_map.size, unit)))
    return np.repeat(grid.kinds, counts)


def segment_count(size: int, unit: int) -> int:
    """Return how many segments an image of `size` bytes has, those that are left out included."""
    return -(-size // unit)


def directory_name(number: int) -> str:
    """Return the name, below /volume, of the directory that segment `number` is in."""
    return f"{number // PER_DIRECTORY:06x}"


def segment_name(number: int, unit: int) -> str:
    """Return the name of segment `number` in its directory."""
    return f"{number * unit:016x}"


def segment_number(directory: str, name: str, unit: int) -> int:
    """Return the number of the segment of that name; ValueError if no segment of that unit has it, there."""
    number, rest = divmod(int(name, 16), unit)
    if (
        rest
        or len(name) != 16
        or number * unit >> 62
        or name != segment_name(number, unit)
        or directory != directory_name(number)
    ):
        raise ValueError(f"{directory}/{name} is not a segment")
    return number


def stamps_to_bytes(stamps: Stamps) -> bytes:
    """Return the stored form: `blockferry stamps 1\\n`, then zlib of all run lengths (u64 LE), all stamps (i64 LE)."""
    starts = np.flatnonzero(np.diff(stamps, prepend=stamps[:1] - 1))
    lengths = np.diff(np.append(starts, stamps.size)).astype("<u8")
    return _MAGIC + zlib.compress(lengths.tobytes() + stamps[starts].astype("<i8").tobytes(), 1)


def stamps_from_bytes(stored: bytes, count: int, where: str) -> Stamps:
    """Return the stamps of the stored form; raise DamagedSnapshotError, naming `where`, if they are not `count`."""
    try:
        if not stored.startswith(_MAGIC):
            raise ValueError("they are of no known version")
        # A run is 16 bytes and covers a segment or more: no image needs a longer stream.
        plain = zlib.decompressobj().decompress(stored[len(_MAGIC) :], 16 * count + 1)
        runs, rest = divmod(len(plain), 16)
        lengths, values = np.frombuffer(plain, "<u8", runs), np.frombuffer(plain, "<i8", runs, runs * 8)
        if rest or bool((lengths > count).any()) or int(lengths.sum()) != count:
            raise ValueError(f"they are not for {count} segments")
        return np.repeat(values.astype(np.int64), lengths.astype(np.int64))
    except (ValueError, zlib.error) as error:
        raise DamagedSnapshotError(
            f"{where}: the segments' stamps cannot be read: {error}",
            remedy="Make a full backup; `restic check` tells whether the repository is sound.",
        ) from None


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of one image: `kinds` and `stamps` by number, `size` and `unit` in bytes."""

    size: int
    unit: int
    kinds: Kinds
    stamps: Stamps

    @classmethod
    def plan(cls, block_map: BlockMap, unit: int, stamp: int, base_stamps: Stamps | None) -> Segments:
        """Return the segments of a new snapshot: data gets `stamp`, same gets what the base has.

        Raise BaseUnusableError if the base does not have a segment that the map says is the same.
        """
        kinds = segment_kinds(block_map, unit)
        stamps = np.where(kinds == Kind.DATA, np.int64(stamp), np.int64(0))
        same = kinds == Kind.SAME
        if same.any():
            stamps[same] = base_stamps[same] if base_stamps is not None else 0
            missing = np.flatnonzero(same & (stamps == 0))
            if missing.size:
                raise BaseUnusableError(
                    f"the base has nothing at {int(missing[0]) * unit} and {missing.size - 1} more places"
                    " that are said to be the same",
                    remedy="Make a full backup.",
                )
        return cls(block_map.size, unit, kinds, stamps)

    def __len__(self) -> int:
        return int(self.kinds.size)

    def length(self, number: int) -> int:
        """Return the size of a segment."""
        return min(self.unit, self.size - number * self.unit)

    def present(self, first: int = 0, end: int | None = None) -> Offsets:
        """Return the numbers of the segments in `[first, end)` that are not left out."""
        return np.flatnonzero(self.kinds[first:end] != Kind.ZERO) + first

    @property
    def data_bytes(self) -> int:
        """The bytes of all segments that are to be read."""
        data = np.flatnonzero(self.kinds == Kind.DATA)
        return sum_lengths(data, self.size, self.unit)


def sum_lengths(numbers: Offsets, size: int, unit: int) -> int:
    """Return the bytes of some segments of an image."""
    return int(np.minimum(unit, size - numbers * unit).sum())


def check_complete(block_map: BlockMap, unit: int, numbers: Offsets, lengths: Offsets, where: str) -> None:
    """Raise DamagedSnapshotError unless every segment that the map needs is among `numbers`, with its right length."""
    needed = np.flatnonzero(segment_kinds(block_map, unit) != Kind.ZERO)
    found = np.full(segment_count(block_map.size, unit), -1, np.int64)
    known = (numbers >= 0) & (numbers < found.size)
    found[numbers[known]] = lengths[known]
    wrong = needed[found[needed] != np.minimum(unit, block_map.size - needed * unit)]
    if wrong.size:
        raise DamagedSnapshotError(
            f"{where}: {wrong.size} of {needed.size} segments are missing or of a wrong size,"
            f" the first at {int(wrong[0]) * unit}",
            remedy="This snapshot cannot be used; take another one. `restic check` tells more.",
        )
