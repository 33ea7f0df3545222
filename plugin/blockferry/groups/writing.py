"""Pieces of a group's image, in its order, written to the files that they belong to.

Most files are small and lie in one piece: they are made, written and finished at once. The others stay open while
there is room, and are not finished before all of their content is there.
"""

from __future__ import annotations

import collections
import os
from typing import Self

import numpy as np
import numpy.typing as npt

from blockferry.errors import DamagedSnapshotError
from blockferry.groups.metadata import Facts
from blockferry.groups.names import shown
from blockferry.groups.placing import Placing, write_all
from blockferry.groups.table import Rows

_FILES = 256
"""How many files are kept open."""

Numbers = npt.NDArray[np.int64]


class Writing:
    """Writes extents that are sorted by their place in the image; leaving the context takes away unfinished files."""

    def __init__(self, placing: Placing, owners: Rows, places: Numbers, lengths: Numbers, logicals: Numbers) -> None:
        self.placing = placing
        self.owners, self.places, self.lengths, self.logicals = owners, places, lengths, logicals
        self._left = np.bincount(owners, minlength=len(placing.table)).astype(np.int32)
        """By row: how many of its extents are still to come."""
        self._next = 0
        self._position = 0
        self._begun: list[int] = []
        """The numbers of extents that the last piece had only the start of."""
        self._open: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._closed: dict[int, tuple[int, int]] = {}
        """Files that are not finished and not open, and how to know them again: device and inode."""
        self._failed: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        for row in (*self._open, *self._closed):
            self.placing.remove(row)

    def take(self, offset: int, piece: memoryview) -> int:
        """Write what the files have of a piece of the image; return how many bytes of extents that was."""
        end = offset + len(piece)
        upto = int(np.searchsorted(self.places, end))
        new = slice(self._next, upto)
        if (self._begun and offset != self._position) or bool((self.places[new] < offset).any()):
            raise self.damage()
        begun, self._begun = self._begun, []
        done = sum(self._go_on(number, offset, piece) for number in begun)
        facts = self.placing.facts(self.owners[new])
        numbers = range(self._next, upto)
        self._next, self._position = upto, end
        places, lengths, logicals = (each[new].tolist() for each in (self.places, self.lengths, self.logicals))
        for number, (row, known), place, length, logical in zip(numbers, facts, places, lengths, logicals, strict=True):
            data = piece[place - offset : place - offset + length]
            whole = len(data) == length
            if whole and self._left[row] == 1 and row not in self._open and row not in self._closed:
                if row not in self._failed:
                    self.placing.make_file(row, known, logical, data)
                self._left[row] = 0
            else:
                self._write(row, known, logical, data, ends=whole)
                if not whole:
                    self._begun.append(number)
            done += len(data)
        return done

    def check_complete(self) -> None:
        """Raise DamagedSnapshotError if anything did not come."""
        if self._begun or self._next != self.owners.size:
            raise self.damage()

    def damage(self) -> DamagedSnapshotError:
        """Return the error that names a file of which not all came."""
        number = self._begun[0] if self._begun else self._next
        path = shown(self.placing.table.path(int(self.owners[number])))
        return DamagedSnapshotError(
            f"the content of {path} is not all in the image",
            remedy="Check the repository with its own tool; restore another snapshot.",
        )

    def _go_on(self, number: int, offset: int, piece: memoryview) -> int:
        """Write what a piece has of an extent that began before it."""
        place, length = int(self.places[number]), int(self.lengths[number])
        data = piece[: place + length - offset]
        ends = offset + len(data) == place + length
        if not ends:
            self._begun.append(number)
        ((row, facts),) = self.placing.facts(self.owners[number : number + 1])
        self._write(row, facts, int(self.logicals[number]) + offset - place, data, ends=ends)
        return len(data)

    def _write(self, row: int, facts: Facts, offset: int, data: memoryview, *, ends: bool) -> None:
        """Write some of a file, and finish it with the last of its extents."""
        if ends:
            self._left[row] -= 1
        if row in self._failed:
            return
        try:
            descriptor = self._descriptor(row, facts)
            write_all(descriptor, offset, data)
            if not self._left[row]:
                self.placing.finish(descriptor, row, facts)
                os.close(self._open.pop(row))
                self.placing.file_made(row)
        except OSError as error:
            self._give_up(row)
            self.placing.fail(row, error)

    def _give_up(self, row: int) -> None:
        """Take away a file that cannot be written."""
        self._failed.add(row)
        if row in self._open or row in self._closed:
            self.placing.remove(row)
        self._closed.pop(row, None)
        if (descriptor := self._open.pop(row, None)) is not None:
            os.close(descriptor)

    def _descriptor(self, row: int, facts: Facts) -> int:
        """Return a descriptor of a file, which is made if it is new."""
        if (known := self._open.get(row)) is not None:
            self._open.move_to_end(row)
            return known
        if row in self._closed:
            descriptor = self.placing.reopen(row, facts, self._closed[row])
            del self._closed[row]
            self._open[row] = descriptor
        else:
            descriptor = self._open[row] = self.placing.create(row, facts)
            os.ftruncate(descriptor, facts.size)
        if len(self._open) > _FILES:
            other, oldest = self._open.popitem(last=False)
            found = os.fstat(oldest)
            self._closed[other] = found.st_dev, found.st_ino
            os.close(oldest)
        return descriptor
