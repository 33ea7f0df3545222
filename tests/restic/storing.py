"""Stores an image through a layer that is as slow as wanted: run as a program, to be killed.

storing.py REPOSITORY IMAGE SECONDS-A-READ
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from blockferry.extents import ExtentSet
from restic_support import CountingLayer, Image, open_repository, store


def main() -> None:
    repository, path, pause = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    plain = CountingLayer.read_into

    def slow(self: CountingLayer, offset: int, buffer: memoryview) -> None:
        plain(self, offset, buffer)
        if sum(length for _offset, length in self.reads) > 8 << 20:
            sys.stdout.write("half-way\n")
            sys.stdout.flush()
            time.sleep(pause)

    CountingLayer.read_into = slow  # type: ignore[method-assign]
    content = np.fromfile(path, np.uint8)
    store(open_repository(repository), Image(path, content, ExtentSet.whole(content.size)))


if __name__ == "__main__":
    main()
