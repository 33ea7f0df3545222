"""Open directories of a restore: each is opened relative to the one that it is in, and no symbolic link is followed."""

from __future__ import annotations

import collections
import os

from blockferry.groups.table import FileTable

_MOST = 256
"""How many are kept open."""


class Directories:
    """Descriptors of the directories of a table, below one that is open."""

    def __init__(self, table: FileTable, root: int) -> None:
        """Borrow the descriptor of the first one."""
        self.table = table
        self._root = root
        self._open: collections.OrderedDict[int, int] = collections.OrderedDict()

    def close(self) -> None:
        """Close all but the first one."""
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, row: int) -> int:
        """Return a descriptor of the directory that was made for a row. It stays open for a while."""
        if row == 0:
            return self._root
        if (known := self._open.get(row)) is not None:
            self._open.move_to_end(row)
            return known
        missing, above = [row], int(self.table.entries["parent"][row])
        while above != 0 and above not in self._open:
            missing.append(above)
            above = int(self.table.entries["parent"][above])
        descriptor = self.descriptor(above)
        for each in reversed(missing):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.table.name(each), flags, dir_fd=descriptor)
            self._open[each] = descriptor
            if len(self._open) > _MOST:
                os.close(self._open.popitem(last=False)[1])
        return descriptor
