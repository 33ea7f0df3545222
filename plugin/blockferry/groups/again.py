"""What became of the files of a group while they were read: each is looked at again, and read anew if need be.

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
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.errors import VolumeError
from blockferry.groups.image import open_row
from blockferry.groups.packing import Packed, is_file
from blockferry.groups.table import BESIDE, CHANGED, EXTENT, GONE, UNREADABLE, FileTable, pack_attributes
from blockferry.groups.walk import GONE_ERRORS, Seen, State, Walked, Walker, attributes_of, is_recent, update, wait_out

_TRIES = 3
_PATIENCE = 10.0
"""Seconds after which files that do not rest are not waited for any more."""
_NOTHING = np.empty(0, EXTENT)
_SPARE_FOR_LINKS = 4096


class SecondLook:
    """Reads what is read file by file while an image is stored, and says at its end what became of all files."""

    def __init__(self, root: bytes, walker: Walker, walked: Walked, packed: Packed) -> None:
        self.root = root
        self.walker = walker
        self.walked = walked
        self.packed = packed
        self.problems: list[tuple[bytes, str]] = []
        self.sealed = b""
        self._table = packed.table
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
            descriptor = open_row(self.root, self._table.path(row))
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

    def seal(self) -> dict[int, bytes]:
        """Look at every file that was read again; return what of them was read anew, and the table of all files."""
        self._patient_until = time.monotonic() + _PATIENCE
        heads = self._heads()
        rows = self._looked_at(heads)
        states = self._states(rows, heads)
        differing = [row for row, state in states.items() if state is not State.SAME]
        if differing:
            table = self._table
            names = np.flatnonzero(np.isin(heads, np.unique(heads[differing])) & is_file(table.entries))
            for _head, members in _by_head(names, heads):
                self._settle(members, states)
            self._table = _replace(dataclasses.replace(table, texts=list(self._texts)), self._extents)
        self.sealed = self._table.to_bytes()
        place, room = self.packed.table_place
        if len(self.sealed) > room:
            raise VolumeError(
                "more files changed while they were read than there is room for",
                remedy="Run the backup again when less is written.",
            )
        return {self.packed.late[0]: bytes(self._fresh), place: self.sealed}

    def _heads(self) -> npt.NDArray[np.int64]:
        """Return, by row, the first name of the same file."""
        links = self._table.entries["link"]
        return np.where(links < 0, np.arange(links.size), links).astype(np.int64)

    def _looked_at(self, heads: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of the files of which content was read, all names of them; not of what failed before.

        One that has a size and no content may have lost it between being asked for the one and for the other.
        """
        has = (np.diff(self.walked.piece_ends, prepend=0) > 0) | (self._table.entries["size"] > 0)
        has &= self.walked.known < 0
        read = np.bincount(heads, has, minlength=heads.size) > 0
        entries = self._table.entries
        return np.flatnonzero(read[heads] & is_file(entries) & (entries["flags"] == 0))

    def _states(self, rows: npt.NDArray[np.int64], heads: npt.NDArray[np.int64]) -> dict[int, State]:
        """Return what became of each of these rows. SAME goes without saying, but for names of files with several."""
        several = np.bincount(heads, minlength=heads.size)[heads] > 1
        found: dict[int, State] = {}
        for row, state in zip(rows.tolist(), self.walker.differing(self._seen(rows)), strict=True):
            head = int(heads[row])
            # A name that was looked at later than the first may be of what the file was by then.
            if state is not State.GONE and ({row, head} & self._failed.keys() or not self._alike(row, head)):
                state = State.MOVED  # noqa: PLW2901
            if state is not State.SAME or several[row]:
                found[row] = state
        return found

    def _seen(self, rows: npt.NDArray[np.int64]) -> Iterator[Seen]:
        """Yield what was seen of these rows."""
        entries, root = self._table.entries, self.root.rstrip(b"/") + b"/"
        inodes, sizes, ctimes = (entries[column][rows].tolist() for column in ("inode", "size", "ctime"))
        wanted = iter(rows.tolist())
        row, number = next(wanted, -1), 0
        for each, path in enumerate(self._table.paths()):
            if each == row:
                yield Seen(root + path, inodes[number], sizes[number], ctimes[number], self._pieces(row))
                row, number = next(wanted, -1), number + 1

    def _pieces(self, row: int) -> bytes:
        """Return the pieces of a file as they were found."""
        ends = self.walked.piece_ends
        return self.walked.pieces[int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()

    def _alike(self, row: int, head: int) -> bool:
        """Tell whether the same was seen by two names."""
        entries = self._table.entries
        if row == head:
            return True
        facts = all(entries[column][row] == entries[column][head] for column in ("size", "ctime"))
        return facts and self._pieces(row) == self._pieces(head)

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
                    self._report(row, CHANGED, "it changed while it was read")
                entries["link"][row] = holder
                if holder < 0:
                    holder, self._extents[row] = row, read
            else:
                entries["size"][row] = 0
                why = self._failed.get(row, "it changed while it was read, and could not be read again")
                self._report(row, UNREADABLE, why)

    def _again(self, row: int, anew: dict[tuple[int, int], int]) -> npt.NDArray[np.void] | int | State:
        """Read a file anew and have its entry say what it is now.

        Return its only extent, if it has one; or the row, of those in `anew`, that is of the same file; or why not.
        """
        try:
            descriptor = open_row(self.root, self._table.path(row))
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
                update(self._table.entries[row : row + 1], before)
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
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > self.packed.late[1] - len(self._fresh):
            return None
        # A write that is under way has had its time of change already; a page that is mapped has one only once it is
        # written out: wait for the one, write out the other.
        self.walker.pieces(descriptor, facts)
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
        update(self._table.entries[row : row + 1], facts)
        self._keep_attributes(row, attributes)
        place = self.packed.late[0] + len(self._fresh)
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
        self.problems.append((os.path.join(self.root, self._table.path(row)), why))


def _by_head(names: npt.NDArray[np.int64], heads: npt.NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    """Yield the rows of each file, in order, with the first one's."""
    order = names[np.argsort(heads[names], kind="stable")]
    which, begins = np.unique(heads[order], return_index=True)
    for head, members in zip(which.tolist(), np.split(order, begins[1:]), strict=True):
        yield head, members.tolist()


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
