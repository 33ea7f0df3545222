"""The segments of an image as files: what of a tree they are, and the image read back from them (`segments.py`)."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet, Offsets
from blockferry.fuse_tree import Node
from blockferry.layers import BaseLayer
from blockferry.segments import PER_DIRECTORY, Segments, directory_name, segment_name, segment_number

_MOST_OPEN = 64

# Inodes: a range for directories and one for segments, above those of whatever else is in the tree.
_TOP, _FIRST_DIRECTORY, _FIRST_SEGMENT = 2, 1 << 24, 1 << 32


class SegmentNodes:
    """The directory of an image's segments within a tree. Names are those below that directory."""

    def __init__(self, segments: Segments, *, inodes_from: int = 0) -> None:
        self.segments = segments
        self._first = inodes_from

    def node(self, names: Sequence[str] = ()) -> Node:
        """Return the directory itself, or what is at the names in it; FileNotFoundError or ValueError for nothing."""
        match names:
            case []:
                return Node(self._first + _TOP, True, 0, int(self.segments.stamps.max(initial=0)))
            case [directory]:
                return self._directory(int(directory, 16))
            case [directory, name]:
                return self._segment(segment_number(directory, name, self.segments.unit))
        raise FileNotFoundError

    def children(self, names: Sequence[str] = ()) -> Iterator[tuple[str, Node]]:
        """Yield what is in the directory itself, or in one in it."""
        if not names:
            for number in sorted(set((self.segments.present() // PER_DIRECTORY).tolist())):
                yield directory_name(number * PER_DIRECTORY), self._directory(number)
            return
        first = int(names[0], 16) * PER_DIRECTORY
        for number in self.segments.present(first, first + PER_DIRECTORY).tolist():
            yield segment_name(number, self.segments.unit), self._segment(number)

    def number(self, inode: int) -> int:
        """Return the number of the segment with that inode, less than 0 if none has it."""
        return inode - self._first - _FIRST_SEGMENT

    def _directory(self, number: int) -> Node:
        """Return the directory of that number: its time is the latest of its segments'."""
        first = number * PER_DIRECTORY
        newest = int(self.segments.stamps[first : first + PER_DIRECTORY].max())
        if not newest:
            raise ValueError("an empty directory is left out")
        return Node(self._first + _FIRST_DIRECTORY + number, True, 0, newest)

    def _segment(self, number: int) -> Node:
        """Return the segment of that number."""
        stamp = int(self.segments.stamps[number])
        if not stamp:
            raise ValueError("the segment is left out")
        return Node(self._first + _FIRST_SEGMENT + number, False, self.segments.length(number), stamp)


class SegmentsLayer(BaseLayer):
    """An image read from the files of its segments; `close` ends what shows them, if it was handed over."""

    def __init__(
        self, root: Path, size: int, unit: int, numbers: Offsets, held: contextlib.ExitStack | None = None
    ) -> None:
        """Take the directory of the segments, the numbers of those in it, and what to let go of."""
        self.size = size
        self.extents = ExtentSet.from_ranges(numbers * unit, np.minimum((numbers + 1) * unit, size))
        self._root = root
        self._unit = unit
        self._held = held or contextlib.ExitStack()
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, _Descriptor] = collections.OrderedDict()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the segments that overlap it."""
        if not self.extents.covers(offset, offset + len(buffer)):
            buffer[:] = bytes(len(buffer))
        for start, length in self.extents.clip(offset, offset + len(buffer)):
            position, end = start, start + length
            while position < end:
                number, within = divmod(position, self._unit)
                count = min(self._unit - within, end - position)
                self._read_segment(number, within, buffer[position - offset : position - offset + count])
                position += count

    def close(self) -> None:
        """Close the files, and let go of what shows them."""
        with self._lock:
            self._open.clear()
        self._held.close()

    def _read_segment(self, number: int, within: int, buffer: memoryview) -> None:
        """Fill the buffer from one segment; whoever shows the files fails the read of what is not sound."""
        file = self._descriptor(number)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(file.number, [buffer[done:]], within + done)
            except OSError as error:
                raise _unreadable(number * self._unit, error.strerror or "the read failed") from None
            if not count:
                raise _unreadable(number * self._unit, "it ends early")
            done += count

    def _descriptor(self, number: int) -> _Descriptor:
        """Return an open segment; those that were not used for longest are let go of."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                path = self._root / directory_name(number) / segment_name(number, self._unit)
                try:
                    file = self._open[number] = _Descriptor(path)
                except OSError as error:
                    raise _unreadable(number * self._unit, error.strerror or "it cannot be opened") from None
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return file


class _Descriptor:
    """An open file that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _unreadable(offset: int, reason: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(
        f"the segment at {offset} cannot be read: {reason}",
        remedy="Is the repository reachable? Its own tool tells whether it is sound (restic check --read-data).",
    )
