"""Looking at files again after they were read: whether each is still what was seen of it, and what to do if not.

Files are looked at by the walker's processes, a few thousand at a time, as soon as the last of their bytes was read.

| a file is now                                   | what is stored of it                                     |
| ----------------------------------------------- | -------------------------------------------------------- |
| as it was seen                                  | what was read                                            |
| changed, elsewhere on the disk, or another file | as it is now, in the room that was left for this         |
| the same, but there is no room or it never rests | what was read, said to be of different instants         |
| elsewhere on the disk, and so on                | nothing, and it is said that it could not be read        |
| gone                                            | nothing                                                  |

Names of one file (hard links) are looked at one by one. As long as all are as they were seen they stay names of one
file. Else what was read belongs to the first that still has it, and those that are read anew are one file if they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from blockferry.errors import VolumeError
from blockferry.groups.image import open_row
from blockferry.groups.packing import Packed
from blockferry.groups.table import BESIDE, CHANGED, EXTENT, GONE, UNREADABLE, FileTable, pack_attributes
from blockferry.groups.walk import GONE_ERRORS, Rows, Seen, State, Walked, Walker, attributes_of, is_recent, wait_out

_AT_ONCE = 4096
_TRIES = 3
_PATIENCE = 10.0
"""Seconds after which files that do not rest are not waited for any more."""
_CHANGED = "it changed while it was read"
_NOTHING = np.empty(0, EXTENT)
_SPARE_FOR_LINKS = 4096


class SecondLook:
    """Looks again at the files of one group's backup; reads those that are read one by one in the first place."""

    def __init__(self, root: bytes, walker: Walker, walked: Walked, packed: Packed) -> None:
        self.problems: list[tuple[bytes, str]] = []
        """Paths of files that are not stored as they should be, and why."""
        self._root = root.rstrip(b"/") + b"/"
        self._walker = walker
        self._walked = walked
        self._packed = packed
        self._table = packed.table
        links = self._table.entries["link"]
        self._heads: Rows = np.where(links < 0, np.arange(links.size), links).astype(np.int64)
        """By row: the first name of the same file."""
        self._rows, self._ends = _by_last_byte(walked, self._table, self._heads)
        self._next = 0
        self._looking: list[tuple[list[int], Future[list[State]]]] = []
        self._directories: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._failed: dict[int, str] = {}
        """Rows whose content could not be read the first time, and why."""
        self._fresh = bytearray()
        self._patient_until = 0.0
        self._texts = {text: number for number, text in enumerate(self._table.texts)}
        self._spare = packed.table_place[1] - self._table.stored_size
        """How many bytes the table may still grow by."""
        self._extents: dict[int, npt.NDArray[np.void]] = {}
        """By row: what a file has now instead of what it had."""

    def read_file(self, row: int, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from a file, through the filesystem; what it lacks reads as zeros, and is seen afterwards."""
        try:
            descriptor = open_row(self._root, self._table.path(row))
        except OSError as error:
            self._cannot(row, buffer, error)
            return
        try:
            if os.fstat(descriptor).st_ino != int(self._table.entries["inode"][row]):
                raise FileNotFoundError(errno.ENOENT, "it was replaced")
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not count:
                    buffer[done:] = bytes(len(buffer) - done)
                    break
                done += count
        except OSError as error:
            self._cannot(row, buffer, error)
        finally:
            os.close(descriptor)

    def _cannot(self, row: int, buffer: memoryview, error: OSError) -> None:
        """Go on without a file."""
        buffer[:] = bytes(len(buffer))
        self._failed[row] = error.strerror or str(error)

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
        self._patient_until = time.monotonic() + _PATIENCE
        states = self._states()
        differing = [row for row, state in states.items() if state is not State.SAME]
        if differing:
            kinds = self._table.entries["mode"] & 0o170000
            names = np.flatnonzero(np.isin(self._heads, self._heads[differing]) & (kinds == stat.S_IFREG))
            for members in _by_head(names, self._heads):
                self._settle(members, states)
            self._table = _replace(dataclasses.replace(self._table, texts=list(self._texts)), self._extents)
        if self._table.stored_size > self._packed.table_place[1]:
            raise VolumeError(
                "more files changed while they were read than there is room for",
                remedy="Run the backup again when less is written.",
            )
        return bytes(self._fresh), self._table

    def _states(self) -> dict[int, State]:
        """Return what became of each file. SAME goes without saying, but for names of files that have several."""
        several = np.bincount(self._heads, minlength=self._heads.size)[self._heads] > 1
        found: dict[int, State] = {}
        for rows, states in self._looking:
            for row, seen in zip(rows, states.result(), strict=True):
                head, state = int(self._heads[row]), seen
                # A name that was looked at later than the first may be of what the file was by then.
                if state is not State.GONE and ({row, head} & self._failed.keys() or not self._alike(row, head)):
                    state = State.MOVED
                if state is not State.SAME or several[row]:
                    found[row] = state
        return found

    def _alike(self, row: int, head: int) -> bool:
        """Tell whether the same was seen by two names."""
        if row == head:
            return True
        entries, pieces, ends = self._table.entries, self._walked.pieces, self._walked.piece_ends
        one, other = (pieces[int(ends[each - 1]) if each else 0 : int(ends[each])].tobytes() for each in (row, head))
        return one == other and all(entries[column][row] == entries[column][head] for column in ("size", "ctime"))

    def _begin(self, end: int) -> None:
        """Have the files up to a number, in the order of their last bytes, looked at."""
        while self._next < end:
            rows = self._rows[self._next : min(end, self._next + 2 * _AT_ONCE)].tolist()
            self._next += len(rows)
            self._looking.append((rows, self._walker.look_again(self._seen(rows))))

    def _seen(self, rows: list[int]) -> Seen:
        """Return what was seen of files."""
        entries, pieces, ends = self._walked.entries, self._walked.pieces, self._walked.piece_ends
        numbers = np.array(rows)
        begins = np.where(numbers > 0, ends[numbers - 1], 0).tolist()
        parents, inodes, sizes, ctimes = (
            entries[column][numbers].tolist() for column in ("parent", "inode", "size", "ctime")
        )
        names = self._table.names_of(numbers)
        return Seen(
            [self._directory(parent) + name for parent, name in zip(parents, names, strict=True)],
            inodes,
            sizes,
            ctimes,
            [pieces[begin:end].tobytes() for begin, end in zip(begins, ends[numbers].tolist(), strict=True)],
        )

    def _directory(self, row: int) -> bytes:
        """Return the absolute path of a directory, with a slash at its end."""
        found = self._directories.get(row)
        if found is None:
            path = self._table.path(row)
            found = self._root + path + b"/" if path else self._root
            self._directories[row] = found
        return found

    def _settle(self, members: list[int], states: dict[int, State]) -> None:
        """Say of a file's names, of which one at least differs, what is stored of each."""
        entries = self._table.entries
        read = self._table.extents_of(members[0]).copy()
        holder, anew = -1, dict[tuple[int, int], int]()
        for row in members:
            entries["link"][row], self._extents[row] = -1, _NOTHING
            if entries["flags"][row]:
                continue  # it failed when it was walked, and was reported
            state = states.get(row, State.SAME)
            again = state if state in {State.SAME, State.GONE} else self._again(row, anew)
            if isinstance(again, int):
                entries["link"][row] = again
            elif isinstance(again, np.ndarray):
                self._extents[row] = again
            elif again is State.GONE:
                entries["flags"][row] |= GONE
            elif state in {State.SAME, State.WRITTEN}:
                if state is State.WRITTEN:
                    self._report(row, CHANGED, _CHANGED)
                entries["link"][row] = holder
                if holder < 0:
                    holder, self._extents[row] = row, read
            else:
                entries["size"][row] = 0
                why = self._failed.get(row, f"{_CHANGED}, and again when it was read anew: it is not stored")
                self._report(row, UNREADABLE, why)

    def _again(self, row: int, anew: dict[tuple[int, int], int]) -> npt.NDArray[np.void] | int | State:
        """Read a file anew and have its entry say what it is now.

        Return its only extent, if it has one; or the row, of those in `anew`, that is of the same file; or why not.
        """
        try:
            descriptor = open_row(self._root, self._table.path(row))
        except OSError as error:
            return State.GONE if error.errno in GONE_ERRORS else State.MOVED
        try:
            return self._settled(row, descriptor, anew)
        except OSError as error:
            self._failed[row] = error.strerror or str(error)
            return State.MOVED
        finally:
            os.close(descriptor)

    def _settled(
        self, row: int, descriptor: int, anew: dict[tuple[int, int], int]
    ) -> npt.NDArray[np.void] | int | State:
        """Read an open file as often as it takes until it was not written to meanwhile."""
        for _ in range(_TRIES):
            before = os.fstat(descriptor)
            identity = before.st_ino, before.st_ctime_ns
            if identity in anew:
                self._update(row, before)
                self._keep_attributes(row, attributes_of(descriptor))
                return anew[identity]
            if time.monotonic() > self._patient_until and is_recent(before.st_ctime_ns):
                break
            content = self._whole(descriptor, before)
            attributes = attributes_of(descriptor)
            after = os.fstat(descriptor)
            if content is None:
                break
            if after.st_ctime_ns == before.st_ctime_ns and before.st_size == after.st_size == len(content):
                anew[identity] = row
                return self._keep(row, after, content, attributes)
        return State.MOVED

    def _whole(self, descriptor: int, facts: os.stat_result) -> bytes | None:
        """Return what a file has, or a byte more than it had if it has grown; None if it is none, or has no room."""
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > self._packed.late[1] - len(self._fresh):
            return None
        # A write that is under way has had its time of change already; a page that is mapped has one only once it is
        # written out: wait for the one, write out the other.
        self._walker.settle(descriptor, facts.st_size)
        with contextlib.suppress(OSError):  # read-only
            os.fdatasync(descriptor)
        wait_out(np.array([facts.st_ctime_ns]))
        parts, done = [], 0
        while done <= facts.st_size and (part := os.pread(descriptor, facts.st_size + 1 - done, done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def _keep(
        self, row: int, facts: os.stat_result, content: bytes, attributes: dict[bytes, bytes]
    ) -> npt.NDArray[np.void]:
        """Put what was read anew into the image, and what is known of it into the table."""
        self._update(row, facts)
        self._keep_attributes(row, attributes)
        place = self._packed.late[0] + len(self._fresh)
        self._fresh += content
        return np.array([(0, len(content), place, BESIDE)] if content else [], EXTENT)

    def _keep_attributes(self, row: int, attributes: dict[bytes, bytes]) -> None:
        """Have an entry's attributes be these, if the table has room for them."""
        number = -1
        if attributes:
            text = pack_attributes(attributes)
            if text not in self._texts:
                if self._spare - len(text) - 8 < _SPARE_FOR_LINKS:
                    self._report(row, CHANGED, "its attributes changed while it was read")
                    return
                self._spare -= len(text) + 8
            number = self._texts.setdefault(text, len(self._texts))
        self._table.entries["attributes"][row] = number

    def _report(self, row: int, flag: int, why: str) -> None:
        self._table.entries["flags"][row] |= flag
        self.problems.append((os.path.join(self._root, self._table.path(row)), why))

    def _update(self, row: int, facts: os.stat_result) -> None:
        """Have an entry say what is known of a file now."""
        entries = self._table.entries
        entries["mode"][row], entries["uid"][row], entries["gid"][row] = facts.st_mode, facts.st_uid, facts.st_gid
        entries["size"][row], entries["inode"][row] = facts.st_size, facts.st_ino
        entries["mtime"][row], entries["ctime"][row] = facts.st_mtime_ns, facts.st_ctime_ns


def _by_last_byte(walked: Walked, table: FileTable, heads: Rows) -> tuple[Rows, Rows]:
    """Return the rows of all files that are read, by where in the image their last bytes lie, and these places.

    All names of a file are among them. One that has a size and no content may have lost it between being asked for
    the one and for the other.
    """
    entries = table.entries
    has = (np.diff(walked.piece_ends, prepend=0) > 0) | (entries["size"] > 0)
    has &= walked.known < 0
    read = np.bincount(heads, has, minlength=heads.size) > 0
    is_file = entries["mode"] & 0o170000 == stat.S_IFREG
    rows = np.flatnonzero(read[heads] & is_file & (entries["flags"] == 0))
    owners = np.repeat(np.arange(len(table)), np.diff(table.extent_ends, prepend=0))
    last = np.zeros(len(table), np.int64)
    np.maximum.at(last, owners, table.extents["place"] + table.extents["length"])
    ends = last[heads[rows]]
    order = np.argsort(ends, kind="stable")
    return rows[order], ends[order]


def _by_head(names: Rows, heads: Rows) -> Iterator[list[int]]:
    """Yield the rows of each file, in order."""
    order = names[np.argsort(heads[names], kind="stable")]
    _which, begins = np.unique(heads[order], return_index=True)
    for members in np.split(order, begins[1:]):
        yield members.tolist()


def _replace(table: FileTable, replaced: dict[int, npt.NDArray[np.void]]) -> FileTable:
    """Return a table in which some files have other extents than they had."""
    owners = np.repeat(np.arange(len(table)), np.diff(table.extent_ends, prepend=0))
    stay = ~np.isin(owners, list(replaced))
    every = np.concatenate([table.extents[stay], *replaced.values()])
    owner = np.concatenate([owners[stay], np.repeat(list(replaced), [each.size for each in replaced.values()])])
    order = np.lexsort((every["logical"], owner))
    return dataclasses.replace(
        table,
        extents=every[order],
        extent_ends=np.cumsum(np.bincount(owner, minlength=len(table))).astype(np.int64),
    )
