"""The files of a group as a tree that can be mounted: `fuse.py` says how."""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Iterator, Mapping

import numpy as np

from blockferry.errors import BlockferryError
from blockferry.fuse_tree import Node, Owned
from blockferry.groups.names import shown
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import GONE, UNREADABLE, unpack_attributes

log = logging.getLogger(__name__)

_DIRECTORIES = 256
"""Of how many directories the names are kept at hand."""


class GroupTree:
    """A group's files, with their owners, modes, times and attributes; content is fetched as it is read.

    Inodes are those of this tree alone; names of one file have the same one.
    """

    def __init__(self, group: StoredGroup) -> None:
        self.group, self.table = group, group.table
        parents, link = self.table.entries["parent"], self.table.entries["link"]
        # The rows of a directory, side by side: nothing is searched through to find them.
        here = np.flatnonzero(~self.table.gone)
        self._by_parent = here[np.argsort(parents[here], kind="stable")]
        self._ends = np.searchsorted(parents[self._by_parent], np.arange(len(self.table)), side="right")
        self._source = np.where(link >= 0, link, np.arange(len(self.table)))
        self._links = np.bincount(self._source, minlength=len(self.table))
        self._allocated = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.table.extents["length"])])
        self._names = functools.lru_cache(_DIRECTORIES)(self._names_of)

    def node(self, path: str) -> Node:
        """Return what is at a path; FileNotFoundError if nothing is."""
        return self._node(self._row(path))

    def children(self, path: str) -> Iterator[tuple[str, Node]]:
        """Return what is in a directory, by row."""
        for row in self._rows(self._row(path)):
            yield os.fsdecode(self.table.name(row)), self._node(row)

    def open(self, path: str) -> int:
        """Return the row that has the content as the handle; OSError with EIO if the backup could not have it."""
        row = int(self._source[self._row(path)])
        if int(self.table.entries["flags"][row]) & (UNREADABLE | GONE):
            raise OSError(errno.EIO, "it could not be read when it was backed up")
        return row

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with content, and zeros where the file has a hole."""
        count = max(0, min(len(buffer), int(self.table.entries["size"][handle]) - offset))
        buffer = buffer[:count]
        done = 0
        for logical, place, length in self._pieces(handle, offset, offset + count):
            start = logical - offset
            buffer[done:start] = bytes(start - done)
            try:
                self.group.image.read_into(place, buffer[start : start + length])
            except BlockferryError as error:
                log.error("%s: %s", shown(self.table.path(handle)), error.message)  # no bug
                raise OSError(errno.EIO, error.message) from None
            done = start + length
        buffer[done:] = bytes(count - done)
        return count

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """Return where data or a hole begins; OSError with ENXIO if there is none."""
        size = int(self.table.entries["size"][handle])
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, "beyond the end")
        extents = self.table.extents_of(handle)
        ends = extents["logical"] + extents["length"]
        first = int(np.searchsorted(ends, offset, side="right"))
        if whence == os.SEEK_DATA:
            if first == extents.size:
                raise OSError(errno.ENXIO, "a hole up to the end")
            return max(offset, int(extents["logical"][first]))
        while first < extents.size and int(extents["logical"][first]) <= offset:
            offset, first = int(ends[first]), first + 1
        return offset

    def target(self, path: str) -> bytes:
        """Return where a symbolic link leads."""
        row = self._row(path)
        row = int(self._source[row])
        if int(self.table.entries["text"][row]) < 0:
            raise OSError(errno.EIO, "it could not be read when it was backed up")
        return self.table.target(row)

    def attributes(self, path: str) -> Mapping[bytes, bytes]:
        """Return the extended attributes of what is at a path."""
        number = int(self.table.entries["attributes"][self._source[self._row(path)]])
        return unpack_attributes(self.table.texts[number]) if number >= 0 else {}

    def _pieces(self, row: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (where in the file, where in the image, length) of what a file has of `[start, end)`."""
        extents = self.table.extents_of(row)
        first = int(np.searchsorted(extents["logical"] + extents["length"], start, side="right"))
        last = int(np.searchsorted(extents["logical"], end, side="left"))
        for logical, length, place, _address in extents[first:last].tolist():
            begin, stop = max(logical, start), min(logical + length, end)
            yield begin, place + begin - logical, stop - begin

    def _row(self, path: str) -> int:
        """Return the row of a path; FileNotFoundError if there is none."""
        row = 0
        for name in filter(None, os.fsencode(path).split(b"/")):
            try:
                row = self._names(row)[name]
            except KeyError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        return row

    def _rows(self, directory: int) -> list[int]:
        """Return the rows of what is in a directory."""
        # Row 0 alone has the parent -1, and so lies before all others.
        start = int(self._ends[directory - 1]) if directory else 1
        found: list[int] = self._by_parent[start : int(self._ends[directory])].tolist()
        return found

    def _names_of(self, directory: int) -> dict[bytes, int]:
        return {self.table.name(row): row for row in self._rows(directory)}

    def _node(self, row: int) -> Node:
        source = int(self._source[row])
        columns = self.table.entries[["mode", "uid", "gid", "size", "mtime", "ctime", "rdev", "text"]][source].item()
        mode, uid, gid, size, mtime, ctime, device, text = columns
        first = int(self.table.extent_ends[source - 1]) if source else 0
        allocated = int(self._allocated[self.table.extent_ends[source]] - self._allocated[first])
        if stat.S_ISLNK(mode) and text >= 0:
            size = len(self.table.texts[text])
        links = 1 if stat.S_ISDIR(mode) else int(self._links[source])
        owned = Owned(mode, uid, gid, links, device, ctime, allocated)
        return Node(source + 1, stat.S_ISDIR(mode), size, mtime, owned=owned)
