"""A load on a filesystem that can be checked: files that are made and written over, each write synced.

    python cluster_files.py DIRECTORY JOURNAL

Every block of a file says which write it is of; the files never change their size. Ends at SIGTERM.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BLOCK = 4096
_ENTRY = struct.Struct("<QQQQ")


@dataclasses.dataclass(frozen=True)
class FileWrite:
    """One write of all of a file: its name, which one it was, when it began and when it was durable (time.time_ns)."""

    file: int
    number: int
    begin: int
    end: int


def _size(file: int) -> int:
    return (1 + file * 7 % 16) * BLOCK


def _content(number: int, size: int) -> bytes:
    return struct.pack("<Q", number) * (size // 8)


def load(directory: Path, journal: Path) -> None:
    """Write until told to end."""
    ending = []
    signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
    chance = random.Random(9)
    made = number = 0
    with open(journal, "wb", buffering=0) as written:
        while not ending:
            file = made if made < 8 or chance.random() < 0.3 else chance.randrange(made)
            number += 1
            begin = time.time_ns()
            with open(directory / str(file), "r+b" if file < made else "w+b", buffering=0) as opened:
                opened.write(_content(number, _size(file)))
                os.fsync(opened.fileno())
            written.write(_ENTRY.pack(file, number, begin, time.time_ns()))
            made = max(made, file + 1)
            time.sleep(chance.random() * 0.01)


def writes_of(journal: Path) -> list[FileWrite]:
    """Return what was written so far."""
    data = journal.read_bytes()
    return [FileWrite(*fields) for fields in _ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size])]


def check(directory: Path, writes: Sequence[FileWrite], instant: int) -> int:
    """Assert that the files are those of the instant (ns); return how many there are."""
    was: dict[int, int] = {}
    under_way: dict[int, int] = {}
    for write in writes:
        if write.end < instant:
            was[write.file] = write.number
        elif write.begin < instant:
            under_way[write.file] = write.number
    there = {int(found.name) for found in directory.iterdir() if found.name.isdigit()}
    assert was.keys() <= there <= was.keys() | under_way.keys(), there.symmetric_difference(was)
    for file, number in was.items():
        found = (directory / str(file)).read_bytes()
        assert len(found) == _size(file)
        for place in range(0, len(found), BLOCK):
            block = found[place : place + BLOCK]
            either = (number, under_way.get(file, number))
            assert block in [_content(each, BLOCK) for each in either], (file, place, either, block[:8])
    return len(was)


if __name__ == "__main__":
    load(Path(sys.argv[1]), Path(sys.argv[2]))
