"""A load on a shared volume that can be checked: processes of several hosts that overwrite the same blocks.

    python cluster_load.py DEVICE LOCKS JOURNAL SEED

Every block that is written says who wrote it, and which write of his it was. Who writes holds a lock on the blocks, for
all hosts, until the write is in the journal: so of two writes of a block it is known which came later. Ends at SIGTERM.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

BLOCK = 4096
MOST = 32
"""Blocks of one write, at most."""
NEVER = (1 << 64) - 1
_ENTRY = struct.Struct("<QQQQQ")


@dataclasses.dataclass(frozen=True)
class Write:
    """One write: blocks, who and which it was, and when it began and was acknowledged (ns, time.time_ns), or NEVER."""

    first: int
    count: int
    number: int
    begin: int
    end: int


def content(number: int, block: int) -> bytes:
    """Return what write `number` puts into a block: every 16 bytes say it, so that no mixture is overlooked."""
    return struct.pack("<QQ", number, block) * (BLOCK // 16)


def load(device: str, locks: str, journal: str, seed: int) -> None:
    """Write until told to end."""
    ending = []
    signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
    chance = random.Random(seed)
    disk = os.open(device, os.O_RDWR | os.O_DIRECT)
    blocks = os.lseek(disk, 0, os.SEEK_END) // BLOCK
    memory = mmap.mmap(-1, MOST * BLOCK)
    with open(locks, "r+b") as lock, open(journal, "w+b", buffering=0) as written:
        number = seed << 32
        while not ending:
            count = chance.choice([1, 1, 2, 5, 16, MOST])
            # Half of it goes to a few hot places, where hosts meet.
            first = chance.randrange(blocks // 16 if chance.random() < 0.5 else blocks - MOST)
            number += 1
            memory[: count * BLOCK] = b"".join(content(number, first + each) for each in range(count))
            fcntl.lockf(lock, fcntl.LOCK_EX, count, first)
            entry = first, count, number, time.time_ns()
            written.write(_ENTRY.pack(*entry, NEVER))
            os.pwrite(disk, memoryview(memory)[: count * BLOCK], first * BLOCK)
            if not chance.randrange(50):
                os.fsync(disk)
            written.seek(-_ENTRY.size, os.SEEK_END)
            written.write(_ENTRY.pack(*entry, time.time_ns()))
            fcntl.lockf(lock, fcntl.LOCK_UN, count, first)
            time.sleep(chance.random() * 0.01)


def journal_of(paths: Sequence[Path]) -> Iterator[Write]:
    """Yield all writes that are in journals."""
    for path in paths:
        for fields in _ENTRY.iter_unpack(path.read_bytes()):
            yield Write(*fields)


def check(image: bytes, before: bytes, writes: Sequence[Write], instant: int) -> int:
    """Assert that an image is that of the instant (ns); `before` is what the volume held before all writes.

    Return how many blocks were under way at the instant: they may have either content, and no process has more than
    one write under way.
    """
    was: dict[int, list[int]] = {}
    may_be: dict[int, set[int]] = {}
    for write in sorted(writes, key=lambda write: write.end):
        for block in range(write.first, write.first + write.count):
            if write.end < instant:
                was[block] = [write.number]
            elif write.begin < instant:
                may_be.setdefault(block, set()).add(write.number)
    for block in range(len(image) // BLOCK):
        found = image[block * BLOCK : (block + 1) * BLOCK]
        expected = [content(each, block) for each in was.get(block, [])] or [
            before[block * BLOCK : (block + 1) * BLOCK]
        ]
        expected += [content(each, block) for each in may_be.get(block, ())]
        if found not in expected:
            number = struct.unpack_from("<Q", found)[0]
            (culprit,) = [write for write in writes if write.number == number] or [None]
            (wanted,) = [write for write in writes if [write.number] == was.get(block)] or [None]
            raise AssertionError((block, culprit, wanted, may_be.get(block), instant))
    return len(may_be)


if __name__ == "__main__":
    load(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
