"""The entries of a table, made one by one below a directory: everything but the content of files.

Whoever can write there while a restore runs may swap a directory for a symbolic link, and a damaged table may say
anything. So each name is used relative to an open directory and never followed, and what was made is only touched by
way of a descriptor of it.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blockferry.groups.directories import Directories
from blockferry.groups.metadata import Facts, Metadata, hands_down
from blockferry.groups.table import CHANGED, UNREADABLE, FileTable, Rows
from blockferry.target import explained

_ROWS = 1 << 16
"""Entries turned into Python's objects at a time: what bounds the memory."""
_HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE})
"""What will not be better with the next file."""


class Problem(NamedTuple):
    """What is not as it was: an entry's path, and a phrase."""

    path: bytes
    what: str


class Placing:
    """Makes entries below an open directory. What fails for one entry becomes a problem; OSError if it would for all.

    Used from one thread.
    """

    def __init__(self, table: FileTable, root: int, *, fresh: bool, force: bool) -> None:
        """Borrow the descriptor of the directory; `fresh` if it was made for this, and so gets the root's metadata."""
        self.table = table
        self.problems: list[Problem] = []
        self.made: collections.Counter[str] = collections.Counter()
        self.force, self.fresh = force, fresh
        self._root = root
        self._directories = Directories(table, root)
        self._metadata = Metadata(table, self.fail)
        self._metadata.inherits = hands_down(root)
        self.finish = self._metadata.apply
        self._is_made = np.zeros(len(table), np.bool_)
        link = table.entries["link"]
        self.source: Rows = np.where(link >= 0, link, np.arange(len(table)))
        """By row: the row that has the content and the metadata; for all but hard links the row itself."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, table: FileTable, destination: Path, *, force: bool) -> Iterator[Placing]:
        """Make the directory, or open it if it is there; TargetError if it cannot be written to."""
        path = os.fspath(destination)
        with explained(path, "making the directory"):
            try:
                destination.mkdir(0o700)
                fresh = True
            except FileExistsError:
                fresh = False
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        placing = None
        try:
            placing = cls(table, root, fresh=fresh, force=force)
            yield placing
        finally:
            if placing:
                placing._directories.close()
            os.close(root)

    def facts(self, rows: Rows) -> Iterator[tuple[int, Facts]]:
        """Yield each row with its columns as Python's numbers."""
        for start in range(0, rows.size, _ROWS):
            some = rows[start : start + _ROWS]
            columns = self.table.entries[self.source[some]]
            columns["parent"] = self.table.entries["parent"][some]
            yield from zip(some.tolist(), map(Facts._make, columns.tolist()), strict=True)

    def existing(self, rows: Rows) -> Iterator[int]:
        """Yield those rows, in their order, in whose place is something already, other than a directory for one."""
        with os.scandir(self._root) as entries:
            if not any(entries):
                return
        there = {0}
        for row, facts in self.facts(rows):
            if facts.parent in there:
                with contextlib.suppress(FileNotFoundError):
                    name, parent = self.table.name(row), self.directory(facts.parent)
                    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode) and stat.S_ISDIR(facts.mode):
                        there.add(row)
                    else:
                        yield row

    def directory(self, row: int) -> int:
        """Return a descriptor of the directory that was made for a row. It stays open for a while."""
        return self._directories.descriptor(row)

    def make_directory(self, row: int, facts: Facts) -> None:
        """Make a directory, for its owner alone, or go into one that is there."""
        with self._tolerant(row):
            name, parent = self.table.name(row), self.directory(facts.parent)
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                there = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(there.st_mode):
                    self._metadata.inherits |= hands_down(self.directory(row))
                elif self.force:
                    os.unlink(name, dir_fd=parent)
                    os.mkdir(name, 0o700, dir_fd=parent)
                else:
                    raise
            self._is_made[row] = True
            self.made["directories"] += 1

    def finish_directory(self, row: int, facts: Facts) -> None:
        """Set a directory's metadata, after all that is in it."""
        if self._is_made[row] or (row == 0 and self.fresh):
            with self._tolerant(row):
                self.finish(self.directory(row), row, facts)

    def make_other(self, row: int, facts: Facts) -> None:
        """Make a symbolic link, device, fifo or socket."""
        with self._tolerant(row):
            name, parent = self.table.name(row), self.directory(facts.parent)
            kind = stat.S_IFMT(facts.mode)

            def make() -> None:
                if kind == stat.S_IFLNK:
                    os.symlink(self.table.texts[facts.text], name, dir_fd=parent)
                else:
                    os.mknod(name, kind | 0o600, facts.rdev, dir_fd=parent)

            try:
                make()
            except FileExistsError:
                self._clear(name, parent)
                make()
            # Opening a device or a fifo would do something to it; this only holds on to it.
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if stat.S_IFMT(os.fstat(descriptor).st_mode) != kind:
                    raise FileExistsError(errno.EEXIST, "something else took its place")
                self.finish(f"/proc/self/fd/{descriptor}", row, facts)
            finally:
                os.close(descriptor)
            self._is_made[row] = True
            self.made["others"] += 1

    def make_file(self, row: int, facts: Facts, offset: int, data: memoryview) -> None:
        """Make a file, all of whose content is `data` at `offset`, or nothing: the rest of its size is a hole."""
        try:
            descriptor = self.create(row, facts)
            try:
                write_all(descriptor, offset, data)
                if facts.size > offset + len(data):
                    os.ftruncate(descriptor, facts.size)
                self.finish(descriptor, row, facts)
            except BaseException:
                self.remove(row)
                raise
            finally:
                os.close(descriptor)
            self.file_made(row)
        except OSError as error:
            self.fail(row, error)

    def create(self, row: int, facts: Facts) -> int:
        """Return a descriptor to write a new and empty file, which its owner alone may open."""
        name, parent = self.table.name(row), self.directory(facts.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, 0o600, dir_fd=parent)
        except FileExistsError:
            self._clear(name, parent)
            return os.open(name, flags, 0o600, dir_fd=parent)

    def reopen(self, row: int, facts: Facts, identity: tuple[int, int]) -> int:
        """Open a file that was made and not finished once more; OSError if it is not the same any more."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.table.name(row), flags, dir_fd=self.directory(facts.parent))
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) != identity:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "somebody else replaced it meanwhile")
        return descriptor

    def remove(self, row: int) -> None:
        """Take away a file that is not whole."""
        with contextlib.suppress(OSError):
            os.unlink(self.table.name(row), dir_fd=self.directory(int(self.table.entries["parent"][row])))

    def file_made(self, row: int) -> None:
        """Count a file that is whole."""
        self._is_made[row] = True
        self.made["files"] += 1

    def make_link(self, row: int, facts: Facts, first: int) -> None:
        """Make a hard link of what was made for the row `first`."""
        with self._tolerant(row):
            if not self._is_made[first]:
                raise FileNotFoundError(errno.ENOENT, "the file that it is a hard link of is not there")
            # Opening the second directory may close the first.
            name, parent = self.table.name(row), os.dup(self.directory(facts.parent))

            def make() -> None:
                above = self.directory(int(self.table.entries["parent"][first]))
                os.link(self.table.name(first), name, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)

            try:
                make()
            except FileExistsError:
                self._clear(name, parent)
                make()
            finally:
                os.close(parent)
            self.made["links"] += 1

    def tell_flags(self, rows: Rows) -> None:
        """Make a problem of each of these entries that was not well when it was backed up."""
        flags = self.table.entries["flags"][self.source[rows]]
        for row in rows[flags & CHANGED != 0].tolist():
            self.problem(row, "changed while it was backed up: it may be of different instants")
        for row in rows[flags & UNREADABLE != 0].tolist():
            self.problem(row, "could not be read when it was backed up")

    def problem(self, row: int, what: str) -> None:
        """Note what is not as it was."""
        self.problems.append(Problem(self.table.path(row), what))

    @contextlib.contextmanager
    def _tolerant(self, row: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fail(row, error)

    def fail(self, row: int, error: OSError, where: str = "") -> None:
        """Note a failure of one entry; raise it if it is none of that entry alone."""
        if error.errno in _HOPELESS:
            raise error
        self.problem(row, f"{where}{error.strerror or error}")

    def _clear(self, name: bytes, parent: int) -> None:
        """Take away what is in the way of a file, if that is wanted; FileExistsError if it is not."""
        if not self.force:
            raise FileExistsError(errno.EEXIST, "something is there already")
        os.unlink(name, dir_fd=parent)


def write_all(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at an offset of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:] if done else data, offset + done)
