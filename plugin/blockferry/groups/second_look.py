"""Looking at files again after they were read: whether each is still what was seen of it, and what to do if not.

Files are looked at by the walker's processes, a few thousand at a time, as soon as the last of their bytes was read.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from concurrent.futures import Future

import numpy as np

from blockferry.groups.image import open_row
from blockferry.groups.packing import Packed
from blockferry.groups.table import BESIDE, CHANGED, EXTENT, GONE, UNREADABLE, FileTable
from blockferry.groups.walk import Rows, Seen, State, Walked, Walker, wait_out

_AT_ONCE = 4096
_TRIES = 3
_CHANGED = "it changed while it was read"


class SecondLook:
    """Looks again at the files of one group's backup."""

    def __init__(self, root: bytes, walker: Walker, walked: Walked, packed: Packed) -> None:
        self.problems: list[tuple[bytes, str]] = []
        """Paths of files that are not stored as they should be, and why."""
        self._root = root.rstrip(b"/") + b"/"
        self._walker = walker
        self._walked = walked
        self._packed = packed
        self._rows, self._ends = _by_last_byte(walked, packed.table)
        self._next = 0
        self._looking: list[tuple[list[int], Future[list[State]]]] = []
        self._directories: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def was_read(self, place: int) -> None:
        """Look at the files all of whose bytes lie before a place of the image, when there are enough of them."""
        with self._lock:
            end = int(np.searchsorted(self._ends, place, side="right"))
            if end - self._next >= _AT_ONCE:
                self._begin(end)

    def finish(self) -> tuple[bytes, FileTable]:
        """Wait for what is still looked at; return what was read anew, for its place in the image, and the table."""
        with self._lock:
            self._begin(self._rows.size)
        late, room = self._packed.late
        fresh = bytearray()
        replaced: dict[int, tuple[int, int]] = {}
        for rows, states in self._looking:
            for row, state in zip(rows, states.result(), strict=True):
                if state is not State.SAME:
                    content = self._mend(row, state, room - len(fresh))
                    if content is not None:
                        replaced[row] = (late + len(fresh), len(content))
                        fresh += content
        return bytes(fresh), _replace(self._packed.table, replaced)

    def _begin(self, end: int) -> None:
        """Have the files up to a number, in the order of their last bytes, looked at."""
        while self._next < end:
            rows = self._rows[self._next : min(end, self._next + 2 * _AT_ONCE)].tolist()
            self._next += len(rows)
            self._looking.append((rows, self._walker.look_again(self._seen(rows))))

    def _seen(self, rows: list[int]) -> list[Seen]:
        """Return what was seen of files."""
        entries, pieces, ends = self._walked.entries, self._walked.pieces, self._walked.piece_ends
        numbers = np.array(rows)
        begins = np.where(numbers > 0, ends[numbers - 1], 0).tolist()
        columns = [entries[column][numbers].tolist() for column in ("parent", "inode", "size", "ctime")]
        name = self._packed.table.name
        return [
            Seen(self._directory(parent) + name(row), inode, size, ctime, pieces[begin:end].tobytes())
            for row, parent, inode, size, ctime, begin, end in zip(
                rows, *columns, begins, ends[numbers].tolist(), strict=True
            )
        ]

    def _directory(self, row: int) -> bytes:
        """Return the absolute path of a directory, with a slash at its end."""
        found = self._directories.get(row)
        if found is None:
            path = self._packed.table.path(row)
            found = self._root + path + b"/" if path else self._root
            self._directories[row] = found
        return found

    def _mend(self, row: int, state: State, room: int) -> bytes | None:
        """Return the content of a file that changed, read anew, b"" for none; None if what was read of it stays.

        Its entry then says what it is, and if it cannot be had whole.
        """
        entry = self._packed.table.entries[row]
        again = self._read_again(row, room) if state is not State.GONE else State.GONE
        if isinstance(again, bytes):
            return again
        path = self._directory(int(entry["parent"])) + self._packed.table.name(row)
        if again is State.GONE:
            entry["flags"] |= GONE
            return b""
        if state is State.WRITTEN:
            entry["flags"] |= CHANGED
            self.problems.append((path, _CHANGED))
            return None
        # What was read from its old place may be another file's by now.
        entry["flags"] |= UNREADABLE
        entry["size"] = 0
        self.problems.append((path, f"{_CHANGED}, and again when it was read anew: it is not stored"))
        return b""

    def _read_again(self, row: int, room: int) -> bytes | State:
        """Read a file anew, and have its entry say what it is now; a State if that cannot be done."""
        for _ in range(_TRIES):
            try:
                descriptor = open_row(self._root, self._packed.table.path(row))
            except OSError:
                return State.GONE
            try:
                before = os.fstat(descriptor)
                if before.st_size > room or not stat.S_ISREG(before.st_mode):
                    return State.WRITTEN
                wait_out(before.st_ctime_ns)
                content = _whole(descriptor, before.st_size)
                after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if (before.st_ctime_ns, before.st_size, len(content)) == (after.st_ctime_ns, after.st_size, after.st_size):
                entry = self._packed.table.entries[row]
                entry["mode"], entry["uid"], entry["gid"] = after.st_mode, after.st_uid, after.st_gid
                entry["size"], entry["mtime"], entry["ctime"] = after.st_size, after.st_mtime_ns, after.st_ctime_ns
                entry["inode"] = after.st_ino
                return content
        return State.WRITTEN


def _by_last_byte(walked: Walked, table: FileTable) -> tuple[Rows, Rows]:
    """Return the rows of all files that are read, by where in the image their last bytes lie, and these places."""
    rows = np.flatnonzero(np.diff(walked.piece_ends, prepend=0))
    owners = np.repeat(np.arange(len(table)), np.diff(table.extent_ends, prepend=0))
    last = np.zeros(len(table), np.int64)
    np.maximum.at(last, owners, table.extents["place"] + table.extents["length"])
    order = np.argsort(last[rows], kind="stable")
    return rows[order], last[rows][order]


def _whole(descriptor: int, size: int) -> bytes:
    """Return what a file has, as far as `size`, or one byte more if it has grown."""
    parts, done = [], 0
    while done <= size:
        part = os.pread(descriptor, size + 1 - done, done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _replace(table: FileTable, replaced: dict[int, tuple[int, int]]) -> FileTable:
    """Return a table in which some files have one extent, (place, length), or none, instead of what they had."""
    if not replaced:
        return table
    owners = np.repeat(np.arange(len(table)), np.diff(table.extent_ends, prepend=0))
    stay = ~np.isin(owners, np.array(list(replaced)))
    new = [(row, place, length) for row, (place, length) in replaced.items() if length]
    added = np.array([(0, length, place, BESIDE) for _row, place, length in new], EXTENT)
    every = np.concatenate([table.extents[stay], added])
    owner = np.concatenate([owners[stay], np.array([row for row, _place, _length in new], np.int64)])
    order = np.lexsort((every["logical"], owner))
    ends = np.cumsum(np.bincount(owner, minlength=len(table))).astype(np.int64)
    return dataclasses.replace(table, extents=every[order], extent_ends=ends)
