"""How a disk of a running machine is named: `qemu:SOCKET:NODE`, a QMP socket and a block node's name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from blockferry.errors import UsageError

_SCHEME = "qemu:"


@dataclasses.dataclass(frozen=True)
class DiskName:
    """A block node of the machine (or `qemu-storage-daemon`) that answers at a socket."""

    socket: str
    node: str

    @classmethod
    def parse(cls, path: str) -> DiskName | None:
        """Return what a volume's path names, None if that is no disk of a machine; UsageError if a part is missing."""
        if not path.startswith(_SCHEME):
            return None
        # The last colon: no node's name has one (QEMU's id_wellformed), a path may.
        socket, _, node = path.removeprefix(_SCHEME).rpartition(":")
        if not socket or not node:
            raise UsageError(
                f"{path}: names no disk of a machine",
                remedy="Write qemu:SOCKET:NODE, for example qemu:/run/vm/qmp.sock:disk0.",
            )
        return cls(str(Path(socket).absolute()), node)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.socket}:{self.node}"
