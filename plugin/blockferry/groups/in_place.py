"""Files of a group, back onto the very blocks of an offline volume that they were read from.

A repair of files whose blocks went bad: of the filesystem nothing but the content of these files is written to, and
that only if all of them still lie exactly where the snapshot's table says. So the volume is held from the first look to
the last write, its filesystem has to be clean, and it is asked itself (`still_there.py`). What is written is whole
blocks, those alone that differ or cannot be read, in the order of the image. Interrupted, some blocks are as they were
and some are brought back; to run it again brings back the rest.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import mmap
import os
import stat

import numpy as np
import numpy.typing as npt
import pluggy

from blockferry import kernel
from blockferry.errors import DamagedSnapshotError, TargetError, VerificationError
from blockferry.extents import ExtentSet
from blockferry.fuse import mount_point
from blockferry.groups.held import EXT, Held, held, mounted_read_only
from blockferry.groups.still_there import check_files
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import Rows
from blockferry.progress import Progress
from blockferry.snapshot import Record
from blockferry.target import explained
from blockferry.volume import Volume

_BATCH = 4 << 20
_GAP = 64 << 10
_LARGEST_BLOCK = 64 << 10
_UNREADABLE = (errno.EIO, errno.EREMOTEIO, errno.ENODATA, errno.EILSEQ)
"""What a read of a bad sector ends with (Linux, block/blk-core.c: an I/O or medium error, a wrong checksum)."""


@dataclasses.dataclass
class BroughtBack:
    """What was done, or would be. Bytes of content compared; bytes of whole blocks written, and found unreadable."""

    files: int
    bytes_compared: int = 0
    bytes_written: int = 0
    bytes_unreadable: int = 0


def bring_back_in_place(
    manager: pluggy.PluginManager,
    group: StoredGroup,
    rows: Rows,
    path: str,
    progress: Progress,
    *,
    force: bool = False,
    dry_run: bool = False,
) -> BroughtBack:
    """Write the content of the regular files among these rows to their blocks of a volume, where it differs.

    With `dry_run` nothing is written, and it is found out what would be. With `force` also of files that were changed
    since the snapshot and did not move. Raise TargetError, before anything is written, if the volume is in use, not
    the one, not clean, or any file is not surely where it was; VerificationError if what was written reads otherwise.
    """
    if os.geteuid() != 0:
        raise TargetError(f"{path}: only root can mount it to look at its files", remedy="Run it as root.")
    table, record = group.table, group.record
    files = rows[(table.entries["mode"][rows] & 0o170000 == stat.S_IFREG) & ~table.gone[rows]]
    # The mount point first: it clears away what a process that was killed has left mounted of the volume.
    with mount_point("in-place") as point, held(path) as volume:
        _refuse_other(volume.volume, record)
        volume.check_clean()
        with mounted_read_only(volume, point):
            block = check_files(manager, table, files, record.path, os.fspath(point), force=force)
        extents = _extents(group, files, block, volume.volume)
        volume.check_untouched()
        blocks = _Blocks(volume, block, BroughtBack(files.size), dry_run=dry_run)
        with progress.task("files", int(extents["length"].sum())) as advance:
            wanted = ExtentSet.from_ranges(extents["place"], extents["place"] + extents["length"]).coalesce(_GAP)
            for offset, piece in group.image.stream(wanted, _BATCH):
                advance(blocks.take(extents, offset, piece))
        blocks.finish(int(extents["length"].sum()))
        return blocks.done


def _refuse_other(volume: Volume, record: Record) -> None:
    """Raise TargetError unless the volume holds the filesystem that a group's record names."""
    known, there = (each.identity.get("filesystem_uuid") for each in (record, volume))
    if volume.filesystem not in (*EXT, "xfs"):
        what = f"holds {volume.filesystem}" if volume.filesystem else "holds no filesystem"
        raise TargetError(
            f"{volume.path}: {what}; only files on ext2, ext3, ext4 and XFS can be brought back in place",
            remedy="Bring them back with --to DIR; of a disk with partitions name the partition.",
        )
    if not known:
        raise TargetError(
            f"snapshot {record.snapshot} does not say where its files lay on a volume",
            remedy="Bring them back with --to DIR.",
        )
    if known != there:
        raise TargetError(
            f"{volume.path}: is not the volume of the snapshot: its filesystem is {there}, not {known}",
            remedy="Name the volume that the group is on: `blkid` lists the UUIDs.",
        )


def _extents(group: StoredGroup, files: Rows, block: int, volume: Volume) -> npt.NDArray[np.void]:
    """Return the extents of files, each once, by place; DamagedSnapshotError if two are in one place."""
    links = group.table.entries["link"][files]
    sources = np.unique(np.where(links >= 0, links, files))
    parts = [group.table.extents_of(row) for row in sources.tolist()]
    extents = np.concatenate([group.table.extents[:0], *parts])
    extents = extents[np.argsort(extents["place"], kind="stable")]
    total = int(extents["length"].sum())
    for column in ("place", "address"):
        sound = not bool((extents[column] < 0).any())
        if not sound or ExtentSet.from_ranges(extents[column], extents[column] + extents["length"]).total != total:
            raise DamagedSnapshotError(
                f"snapshot {group.record.snapshot}: files have the same place in the image or on the volume",
                remedy="Bring the files back with --to DIR.",
            )
    if extents.size and -(-int((extents["address"] + extents["length"]).max()) // block) * block > volume.size:
        raise TargetError(f"{volume.path}: a file lies beyond its end", remedy="Run e2fsck or xfs_repair.")
    return extents


class _Blocks:
    """Reads, compares and writes whole blocks of a held volume."""

    def __init__(self, volume: Held, block: int, done: BroughtBack, *, dry_run: bool) -> None:
        if block > _LARGEST_BLOCK or block % 512:
            raise TargetError(f"{volume.volume.path}: has blocks of {block} bytes", remedy="Use --to DIR.")
        self.done = done
        self._volume, self._path, self._descriptor = volume, volume.volume.path, volume.descriptor
        self._block, self._dry_run = block, dry_run
        self._room = memoryview(mmap.mmap(-1, _BATCH + 2 * _LARGEST_BLOCK))
        self._fresh = memoryview(mmap.mmap(-1, _BATCH + 2 * _LARGEST_BLOCK))
        self._written: list[tuple[int, int, bytes]] = []
        """Address, length and digest of what was written, to be read again."""
        if volume.volume.is_device and block % volume.volume.block_size == 0:
            # Past the page cache, which works in pages: a block beside an unreadable one can be written nevertheless.
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)

    def take(self, extents: npt.NDArray[np.void], offset: int, piece: memoryview) -> int:
        """Bring a piece of the image to where the extents, sorted by place, have it; return how many bytes that was."""
        self._volume.check_alone()
        first = int(np.searchsorted(extents["place"] + extents["length"], offset, side="right"))
        last = int(np.searchsorted(extents["place"], offset + len(piece), side="left"))
        some, count = extents[first:last], 0
        for place, length, address in zip(
            *(some[name].tolist() for name in ("place", "length", "address")), strict=True
        ):
            begin, end = max(place, offset), min(place + length, offset + len(piece))
            self._bring(address + begin - place, piece[begin - offset : end - offset])
            count += end - begin
        self.done.bytes_compared += count
        return count

    def finish(self, total: int) -> None:
        """Make durable what was written, and read it again; DamagedSnapshotError if not all came from the image."""
        with explained(self._path, "writing"):
            if not self._dry_run:
                os.fsync(self._descriptor)
        kernel.forget_pages(self._descriptor)
        for address, length, digest in self._written:
            found, unreadable = self._read(address, length)
            inside = address % self._block
            if unreadable.any() or _digest(found[inside : inside + length]) != digest:
                raise VerificationError(
                    f"{self._path}: what was written at {address} does not read back",
                    remedy="The disk is failing: see the kernel log, and bring the files back elsewhere with --to DIR.",
                )
        if self.done.bytes_compared != total:
            raise DamagedSnapshotError(
                "the content of the files is not all in the image",
                remedy="Check the repository with its own tool; what was brought back is right.",
            )

    def _bring(self, address: int, data: memoryview) -> None:
        """Write the blocks that have not this content at an address; the rest of a block keeps what it has."""
        old, unreadable = self._read(address, len(data))
        inside = address % self._block
        new = self._fresh[: len(old)]
        new[:] = old
        new[inside : inside + len(data)] = data
        rows = (np.frombuffer(each, np.uint8).reshape(-1, self._block) for each in (old, new))
        wanted = np.not_equal(*rows).any(axis=1) | unreadable
        if not wanted.any():
            return
        runs = ExtentSet.from_bits(wanted, self._block)
        self.done.bytes_written += runs.total
        self.done.bytes_unreadable += int(unreadable.sum()) * self._block
        if not self._dry_run:
            self._written.append((address, len(data), _digest(data)))
            for start, length in runs:
                self._write(address - inside + start, new[start : start + length])

    def _read(self, address: int, length: int) -> tuple[memoryview, npt.NDArray[np.bool_]]:
        """Return the blocks that a stretch of the volume lies in, and which of them cannot be read: these are zeros."""
        begin = address // self._block * self._block
        buffer = self._room[: -(-(address + length) // self._block) * self._block - begin]
        unreadable = np.zeros(len(buffer) // self._block, np.bool_)
        if not self._fill(begin, buffer):
            for number in range(unreadable.size):
                part = buffer[number * self._block : (number + 1) * self._block]
                if not self._fill(begin + number * self._block, part):
                    unreadable[number] = True
                    part[:] = bytes(len(part))
        return buffer, unreadable

    def _fill(self, offset: int, buffer: memoryview) -> bool:
        """Fill a buffer from the volume; return False if some of it cannot be read."""
        done = 0
        with explained(self._path, f"reading at {offset}"):
            while done < len(buffer):
                try:
                    count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                except OSError as error:
                    if error.errno in _UNREADABLE:
                        return False
                    raise
                if not count:
                    raise OSError(errno.ENXIO, "it ends there")
                done += count
        return True

    def _write(self, offset: int, data: memoryview) -> None:
        with explained(self._path, f"writing {len(data)} bytes at {offset}"):
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                offset, data = offset + count, data[count:]


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
