"""Whether files of a group are still exactly where its table says, on the volume, which is mounted read-only for this.

What the table says may be wrong, or of another volume altogether. A file counts only if the filesystem itself says the
same: the same inode under the same path, of the same size, with the same extents at the same addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pluggy

from blockferry.errors import TargetError
from blockferry.fiemap import file_extents
from blockferry.groups.content import PIECE, Contents
from blockferry.groups.directories import Directories
from blockferry.groups.names import shown
from blockferry.groups.place import Filesystem
from blockferry.groups.table import BESIDE, CHANGED, GONE, UNREADABLE, FileTable, Rows

_MOST_NAMED = 3
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_files(
    manager: pluggy.PluginManager, table: FileTable, rows: Rows, root: str, mounted: str, *, force: bool
) -> int:
    """Raise TargetError, naming the first few and why, unless each file of these rows lies where the table says.

    `root` is where the group's root was, `mounted` where its filesystem is mounted now. A file that was written to, or
    otherwise changed, since the snapshot only counts with `force`. Return the size of the filesystem's blocks.
    """
    filesystem = Filesystem.of(manager, os.fsencode(mounted))
    if filesystem.volume is None:
        raise TargetError(
            f"its files cannot be found on the device: {filesystem.reason}",
            remedy="Bring them back with --to DIR.",
        )
    with _opened_root(mounted, root, int(table.entries["inode"][0])) as descriptor:
        block = os.fstatvfs(descriptor).f_bsize
        looking = _Looking(table, descriptor, filesystem.contents, block, force=force)
        with contextlib.closing(looking.directories):
            _refuse([(row, why) for row in rows.tolist() if (why := looking.why_not(row))], table, rows.size)
    return block


def _refuse(found: list[tuple[int, str]], table: FileTable, count: int) -> None:
    """Raise TargetError if anything was found."""
    if found:
        named = "; ".join(f"{shown(table.path(row))}: {why}" for row, why in found[:_MOST_NAMED])
        raise TargetError(
            f"{len(found)} of {count} files cannot be brought back in place: {named}",
            remedy="Nothing was written. Select others by patterns, or bring these back with --to DIR.",
        )


@dataclasses.dataclass
class _Looking:
    """Looks at one file after the other."""

    table: FileTable
    root: int
    contents: Contents
    block: int
    force: bool = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        self.directories = Directories(self.table, self.root)
        self._device = os.fstat(self.root).st_dev

    def why_not(self, row: int) -> str:
        """Return why a file is not surely where it was; "" if it is."""
        entries = self.table.entries
        link = int(entries["link"][row])
        flags = int(entries["flags"][row] | entries["flags"][link if link >= 0 else row])
        if flags & (UNREADABLE | GONE):
            return "it could not be read when it was backed up"
        if flags & CHANGED:
            return "it changed while it was backed up"
        try:
            descriptor = self.contents.open(
                self.table.name(row), self.directories.descriptor(int(entries["parent"][row]))
            )
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            return "it is not there" if missing else f"it cannot be opened: {error.strerror}"
        try:
            return self._compare(row, descriptor)
        except OSError as error:
            return f"it cannot be looked at: {error.strerror}"
        finally:
            os.close(descriptor)

    def _compare(self, row: int, descriptor: int) -> str:
        """Return how an open file differs from its entry."""
        entry, facts = self.table.entries[row], os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_dev != self._device or facts.st_ino != entry["inode"]:
            return "another file is there"
        if facts.st_size != entry["size"]:
            return f"it has {facts.st_size} bytes, not {entry['size']}"
        why = self._compare_extents(row, descriptor)
        if not why and not self.force and (facts.st_mtime_ns, facts.st_ctime_ns) != (entry["mtime"], entry["ctime"]):
            return "it was changed since the snapshot (--force takes that back)"
        return why

    def _compare_extents(self, row: int, descriptor: int) -> str:
        """Return why an open file, of the right size, does not lie on the very blocks where it lay."""
        size = int(self.table.entries["size"][row])
        then = joined(pieces_of(self.table.extents_of(row)))
        if bool((then["address"] == BESIDE).any()):
            return "it was read as a file, not from its blocks (inline, encoded, or changing)"
        found = bytearray()
        self.contents.pieces(descriptor, size, found)
        now = joined(np.frombuffer(found, PIECE))
        if bool((now["address"] == BESIDE).any()) or not np.array_equal(then, now):
            return "it lies elsewhere"
        if bool(file_extents(descriptor).shared.any()):
            return "it shares blocks with others (a reflink)"
        ends = then["logical"] + then["length"]
        cut = (then["logical"] % self.block != 0) | (then["address"] % self.block != 0)
        cut |= (ends % self.block != 0) & (ends != size)
        return "its extents are not of whole blocks" if bool(cut.any()) else ""


def pieces_of(extents: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return extents of a table, EXTENT, as what a filesystem says: PIECE each."""
    pieces = np.empty(extents.size, PIECE)
    for name in PIECE.names or ():
        pieces[name] = extents[name]
    return pieces


def joined(pieces: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return the pieces of a file, which are in order, with those made one that go on in the file and on the volume."""
    if pieces.size < 2:
        return pieces
    ends, after = pieces["logical"] + pieces["length"], pieces["address"] + pieces["length"]
    beside = pieces["address"] == BESIDE
    goes_on = (pieces["logical"][1:] == ends[:-1]) & (pieces["address"][1:] == after[:-1])
    goes_on &= ~beside[1:] & ~beside[:-1]
    first = np.flatnonzero(np.append(True, ~goes_on))
    found = pieces[first].copy()
    found["length"] = ends[np.append(first[1:], pieces.size) - 1] - found["logical"]
    return found


@contextlib.contextmanager
def _opened_root(mounted: str, root: str, inode: int) -> Iterator[int]:
    """Open the directory that was a group's root: its path without what led to the filesystem, the same inode."""
    names = [name for name in root.split("/") if name not in ("", ".")]
    for skipped in range(len(names), -1, -1):
        with contextlib.ExitStack() as opened:
            descriptor = _open_below(mounted, names[skipped:], opened)
            if descriptor is not None and os.fstat(descriptor).st_ino == inode:
                yield descriptor
                return
    raise TargetError(f"the group's root, {root}, is not on the volume", remedy="Bring the files back with --to DIR.")


def _open_below(mounted: str, names: list[str], opened: contextlib.ExitStack) -> int | None:
    """Open a directory step by step, through no symbolic link and not out of its filesystem; None if there is none."""
    descriptor = os.open(mounted, _DIRECTORY)
    opened.callback(os.close, descriptor)
    device = os.fstat(descriptor).st_dev
    for name in names:
        try:
            descriptor = os.open(name, _DIRECTORY, dir_fd=descriptor)
        except (OSError, ValueError):
            return None
        opened.callback(os.close, descriptor)
        if name == ".." or os.fstat(descriptor).st_dev != device:
            return None
    return descriptor
