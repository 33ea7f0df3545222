"""The tree that restic is given to back up: the segments of an image, read from a layer as restic asks for them.

/blockferry.json                    the record
/blockferry.map                     the block map
/blockferry.stamps                  the version stamp of every segment
/volume/DDDDDD/OOOOOOOOOOOOOOOO     the segments, as in `blockferry.segments`
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

from blockferry.blockmap import Kind
from blockferry.errors import BaseUnusableError
from blockferry.fuse_tree import Node
from blockferry.layers import Layer
from blockferry.segment_files import SegmentNodes
from blockferry.segments import STAMPS_NAME, VOLUME_DIRECTORY, Segments, stamps_to_bytes
from blockferry.snapshot import MAP_NAME, RECORD_NAME

_ROOT, _FIRST_FILE = 1, 3
"""Inodes: between them, and above, are those of the segments."""


class SegmentTree:
    """A `blockferry.fuse.Tree` of one image's segments and the files beside them.

    The first failure of a read is kept in `failure`, and `on_failure` is called before anything is answered; then reads
    that wait for others are told not to.
    """

    def __init__(self, source: Layer, segments: Segments, *, record: bytes, block_map: bytes, stamp: int) -> None:
        """Take the stored form of the record and the block map, and the stamp of this backup's own files."""
        self.source = source
        self.segments = segments
        self._nodes = SegmentNodes(segments)
        self.stamp = stamp
        self.files = {RECORD_NAME: record, MAP_NAME: block_map, STAMPS_NAME: stamps_to_bytes(segments.stamps)}
        self.served = 0
        """Bytes of segments that were handed to restic so far."""
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many files there are."""
        return len(self.files) + len(self.segments.present())

    def node(self, path: str) -> Node:
        """Return what is at a path."""
        try:
            match path.split("/")[1:]:
                case [""]:
                    return Node(_ROOT, True, 0, self.stamp)
                case [directory, *names] if directory == VOLUME_DIRECTORY:
                    return self._nodes.node(names)
                case [name]:
                    number = list(self.files).index(name)
                    return Node(_FIRST_FILE + number, False, len(self.files[name]), self.stamp)
        except (ValueError, IndexError, FileNotFoundError):
            pass
        raise FileNotFoundError(errno.ENOENT, path)

    def children(self, path: str) -> Iterator[tuple[str, Node]]:
        """Yield what is in a directory."""
        match path.split("/")[1:]:
            case [""]:
                for name in (*self.files, VOLUME_DIRECTORY):
                    yield name, self.node(f"/{name}")
            case [_volume, *names]:
                yield from self._nodes.children(names)

    def open(self, path: str) -> int:
        """Return the inode of a file, which is its handle."""
        return self.node(path).inode

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from a file; after the first failure no read succeeds any more."""
        try:
            segment = self._nodes.number(handle)
            if segment < 0:
                content = list(self.files.values())[handle - _FIRST_FILE][offset : offset + len(buffer)]
                buffer[: len(content)] = content
                return len(content)
            return self._read_segment(segment, offset, buffer)
        except BaseException as error:  # whatever it is, restic must not take it for a file it may skip
            self._fail(error)
            raise OSError(errno.EIO, "the source failed") from None

    def seek(self, _handle: int, _offset: int, _whence: int) -> int:
        """Segments have no holes."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _read_segment(self, number: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from a segment of the source; a segment that is as in the base must not be asked for."""
        if self.failure is not None:
            raise self.failure
        if self.segments.kinds[number] != Kind.DATA:
            raise BaseUnusableError(
                f"restic no longer has the segment at {number * self.segments.unit} of the base",
                remedy="Make a full backup, and run `restic check`.",
            )
        count = max(0, min(len(buffer), self.segments.length(number) - offset))
        if not count:  # how a reader finds the end
            return 0
        self.source.read_into(number * self.segments.unit + offset, buffer[:count])
        with self._lock:
            self.served += count
        return count

    def _fail(self, error: BaseException) -> None:
        """Remember the first failure and tell of it; every later one waits here until that is done."""
        with self._lock:
            if self.failure is None:
                self.failure = error
                self.on_failure()
                self.source.give_up(error)
