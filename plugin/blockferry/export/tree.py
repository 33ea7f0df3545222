"""The files that an export shows. Of each volume:

    VOLUME.json         the record (docs/format.md)
    VOLUME.map          the block map
    VOLUME.img          the image, with holes where nothing is in use; or
    VOLUME.segments/    the same as segments (`blockferry.segments`)

A tool that skips unchanged files compares size, times and inode, so these are functions of the volume's name and its
stamps. The record and the map are later than all else: borg does not remember files with the latest time of a run.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence

from blockferry.directory import IMAGE, MAP, RECORD, SEGMENTS
from blockferry.export.view import View
from blockferry.extents import ExtentSet
from blockferry.fuse_tree import Node, seek_in
from blockferry.segment_files import SegmentNodes

_ROOT = 1
_RECORD, _MAP, _IMAGE = 3, 4, 5
"""Inodes within a volume, beside those of the segments."""
_INODES = 1 << 40
"""Inodes, and handles, for each volume: more than it can have segments."""
_NUMBERS = 1 << 20


class ExportTree:
    """A `blockferry.fuse.Tree` of some volumes, as images or as segments. Used by the threads of the FUSE server."""

    def __init__(self, views: Sequence[View], *, as_segments: bool) -> None:
        self._as_segments = as_segments
        self._volumes = {view.name: _Volume(view, as_segments=as_segments) for view in views}
        self._numbers = {name: number for number, name in enumerate(self._volumes)}
        self._newest = max((view.newest for view in views), default=0) + 10**9
        self._by_number = list(self._volumes.values())

    def node(self, path: str) -> Node:
        """Return what is at a path."""
        names = path.split("/")[1:]
        if names == [""]:
            return Node(_ROOT, True, 0, self._newest)
        try:
            _number, volume, names = self._find(names)
            return volume.node(names, self._newest)
        except (ValueError, IndexError, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, path) from None

    def children(self, path: str) -> Iterator[tuple[str, Node]]:
        """Yield what is in a directory."""
        names = path.split("/")[1:]
        if names != [""]:
            _number, volume, names = self._find(names)
            yield from volume.nodes.children(names[1:])
            return
        for name, volume in self._volumes.items():
            for ending in volume.endings:
                yield name + ending, volume.node([ending], self._newest)

    def open(self, path: str) -> int:
        """Return a file's handle: the number of its volume and its inode there."""
        number, volume, names = self._find(path.split("/")[1:])
        return number * _INODES + volume.node(names, self._newest).inode % _INODES

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from a file; OSError with EIO if the volume does not hold still any more."""
        number, inode = divmod(handle, _INODES)
        return self._by_number[number].read_into(inode, offset, buffer)

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """Return where data, or a hole, begins: only images have holes."""
        if self._as_segments:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        number, inode = divmod(handle, _INODES)
        volume = self._by_number[number]
        if inode in volume.files:
            size = len(volume.files[inode])
            return seek_in(ExtentSet.whole(size), size, offset, whence)
        return seek_in(volume.view.layer.extents, volume.view.record.size, offset, whence)

    def _find(self, names: Sequence[str]) -> tuple[int, _Volume, list[str]]:
        """Return the number of a volume, the volume, and what remains of the names: the ending of the first, others."""
        name, dot, ending = names[0].rpartition(".")
        if name not in self._volumes or dot + ending not in self._volumes[name].endings:
            raise FileNotFoundError(errno.ENOENT, names[0])
        return self._numbers[name], self._volumes[name], [dot + ending, *names[1:]]


class _Volume:
    """The files of one volume."""

    def __init__(self, view: View, *, as_segments: bool) -> None:
        self.view = view
        self.endings = (RECORD, MAP, SEGMENTS if as_segments else IMAGE)
        self.files = {_RECORD: view.record.to_json(), _MAP: view.block_map.to_bytes()}
        # Of the name alone: the others of an export are not always the same.
        digest = hashlib.blake2b(view.name.encode(), digest_size=8).digest()
        self.first = (1 + int.from_bytes(digest) % _NUMBERS) * _INODES
        self.nodes = SegmentNodes(view.segments, inodes_from=self.first)

    def node(self, names: Sequence[str], newest: int) -> Node:
        """Return what is at an ending and the names below it; `newest` is the time of the record and the map."""
        match names:
            case [ending] if ending in (RECORD, MAP):
                inode = _RECORD if ending == RECORD else _MAP
                return Node(self.first + inode, False, len(self.files[inode]), newest)
            case [ending] if ending == IMAGE:
                return Node(self.first + _IMAGE, False, self.view.record.size, self.view.image_stamp)
            case [ending, *below] if ending == SEGMENTS:
                return self.nodes.node(below)
        raise FileNotFoundError

    def read_into(self, inode: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from the file of that inode; return how many bytes there were."""
        if inode in self.files:
            content = self.files[inode][offset : offset + len(buffer)]
            buffer[: len(content)] = content
            return len(content)
        record, start, length = self.view.record, 0, self.view.record.size
        if inode != _IMAGE:
            number = self.nodes.number(self.first + inode)
            start, length = number * record.unit, self.view.segments.length(number)
        count = max(0, min(len(buffer), length - offset))
        if count:  # else the reader has found the end
            self.view.read_into(start + offset, buffer[:count])
        return count
