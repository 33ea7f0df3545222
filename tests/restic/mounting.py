"""Mounts a tree of one file, says where, and waits to be killed: run as a program.

mounting.py NAME [USER-ID]
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator

from blockferry.fuse import _server_class, mounted
from blockferry.fuse_tree import Node

SIZE = 5 << 20
HOLE = 3 << 20


class OneFile:
    """`/file`: what each byte is follows from its offset; its end is a hole."""

    def node(self, path: str) -> Node:
        if path == "/":
            return Node(1, True, 0, 7)
        if path == "/file":
            return Node(1 << 40, False, SIZE, 1_700_000_000_123_456_789)
        raise FileNotFoundError(errno.ENOENT, path)

    def children(self, path: str) -> Iterator[tuple[str, Node]]:
        yield "file", self.node(f"{path}file")

    def open(self, path: str) -> int:
        return self.node(path).inode

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        assert handle == 1 << 40
        count = max(0, min(len(buffer), SIZE - offset))
        buffer[:count] = content(offset, count)
        return count

    def seek(self, _handle: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            return max(offset, HOLE)
        if offset >= HOLE:
            raise OSError(errno.ENXIO, "no data there")
        return offset


def content(offset: int, count: int) -> bytes:
    first = offset // 251 * 251
    return (bytes(range(251)) * (count // 251 + 2))[offset - first :][:count]


def main() -> None:
    if len(sys.argv) > 2:
        _server_class()  # what is imported must be imported before the interpreter's files are out of reach
        os.setgroups([])
        os.setgid(int(sys.argv[2]))
        os.setuid(int(sys.argv[2]))
    with mounted(OneFile(), name=sys.argv[1]) as path:
        sys.stdout.write(f"{path} {os.listdir(path)}\n")
        sys.stdout.flush()
        time.sleep(60)


if __name__ == "__main__":
    main()
