"""A directory of files made up of layers, for a borg command to read through FUSE."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from blockferry.fuse_tree import Node, seek_in
from blockferry.layers import CutLayer, Layer

_ROOT = 1


class LayerTree:
    """A `blockferry.fuse.Tree` of one directory: each file shows the extents of a layer, and holes elsewhere.

    What a layer fails with is kept in `failure`, and `on_failure` is called: borg itself would go on with a shorter
    file. Used by the threads of the FUSE server.
    """

    def __init__(self, files: Mapping[str, Layer], counted: str) -> None:
        """Show `files`; the bytes read of the one called `counted` are in `served`."""
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = _nothing
        self.served = 0
        self._counted = list(files).index(counted)
        self._layers: list[Layer] = [CutLayer(layer, layer.extents) for layer in files.values()]
        self._lock = threading.Lock()
        now = time.time_ns()
        self._nodes = {
            f"/{name}": Node(inode, is_directory=False, size=layer.size, mtime_ns=now)
            for inode, (name, layer) in zip(itertools.count(_ROOT + 1), files.items(), strict=False)
        }
        self._root = Node(_ROOT, is_directory=True, size=0, mtime_ns=now)

    def node(self, path: str) -> Node:
        """Return what is at a path; raise FileNotFoundError if nothing is."""
        if path == "/":
            return self._root
        if path not in self._nodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._nodes[path]

    def children(self, path: str) -> Iterable[tuple[str, Node]]:
        """Return the files."""
        return [(name[1:], node) for name, node in self._nodes.items()] if path == "/" else []

    def open(self, path: str) -> int:
        """Return a file's number."""
        return self.node(path).inode - _ROOT - 1

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Read from a layer."""
        layer = self._layers[handle]
        wanted = buffer[: max(0, min(len(buffer), layer.size - offset))]
        try:
            layer.read_into(offset, wanted)
        except Exception as error:
            with self._lock:
                self.failure = self.failure or error
            self.on_failure()
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if handle == self._counted:
            with self._lock:
                self.served += layer.extents.clip(offset, offset + len(wanted)).total
        return len(wanted)

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """Return where data, or a hole, begins at or after `offset`; raise OSError with ENXIO if nowhere."""
        layer = self._layers[handle]
        return seek_in(layer.extents, layer.size, offset, whence)


def _nothing() -> None:
    """Nobody waits to be told of a failure."""
