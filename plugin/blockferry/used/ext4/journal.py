"""What replaying a journal (jbd2) would make of a filesystem, without replaying it.

From the kernel's Documentation/filesystems/ext4/journal.rst; all numbers are big endian. The log is a ring of blocks
in a hidden file. A transaction is a run of descriptor blocks, each followed by the copies of the blocks that its tags
name, of revocation blocks, and one commit block; all bear the transaction's number. Replay takes the transactions in
order, from the one that the journal's superblock names up to the last that has its commit block, and writes each
copy to its place, except those of a block that the same or a later transaction revokes.

The log is read the way replay does, and then more strictly. A block of the log, or a copy, whose checksum is wrong
makes replay fail or stop in ways that differ between the kernel's versions and e2fsck; here it is an
UnanswerableError. So are the kinds of log of which the checksums of a commit decide whether it counts
(`journal_async_commit`, and the first form of `journal_checksum`), and fast commits, which are not copies of blocks
but changes that only the filesystem's own code can apply.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

import numpy as np
import numpy.typing as npt

from blockferry.extents import Offsets
from blockferry.used.checksum import Rows, crc32c
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.inode import JournalFile
from blockferry.used.ext4.superblock import Superblock, UnanswerableError

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_1, _SUPERBLOCK_2, _REVOCATION = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST_TAG = 1, 2, 8
_MOST_REMEMBERED = 1 << 21  # 8 GiB of log in blocks of 4 KiB; what is kept of it stays below 150 MB
_VERIFIED_AT_ONCE = 4 << 20  # bytes


class _Compat(enum.IntFlag):
    CHECKSUM = 0x1


class _Incompat(enum.IntFlag):
    REVOKE = 0x1
    SIXTY_FOUR_BIT = 0x2
    ASYNC_COMMIT = 0x4
    CSUM_V2 = 0x8
    CSUM_V3 = 0x10
    FAST_COMMIT = 0x20


class Replay:
    """Where to read the blocks that a replay would overwrite: a `Relocation` of them into the journal."""

    def __init__(self, targets: Offsets, copies: Offsets, escaped: npt.NDArray[np.bool_]) -> None:
        """Take the copies in the order of their writing: block `targets[i]` as it lies in block `copies[i]`.

        `escaped[i]`: the copy's first four bytes are blanked, because they were the journal's magic number.
        """
        self.targets, last = np.unique(targets[::-1], return_index=True)
        self.copies = copies[::-1][last]
        self.escaped = escaped[::-1][last]

    def places(self, blocks: Offsets) -> Offsets:
        """Return the block in which each of `blocks` lies: its last copy, or itself."""
        index, found = self._find(blocks)
        return np.where(found, self.copies[index], blocks)

    def mend(self, blocks: Offsets, rows: Rows) -> None:
        """Put back the magic number into what was read of escaped copies."""
        index, found = self._find(blocks)
        rows[found & self.escaped[index], :4] = np.frombuffer(struct.pack(">I", _MAGIC), np.uint8)

    def _find(self, blocks: Offsets) -> tuple[Offsets, npt.NDArray[np.bool_]]:
        index = np.minimum(np.searchsorted(self.targets, blocks), self.targets.size - 1)
        return index, self.targets[index] == blocks


def pending_replay(reader: BlockReader, superblock: Superblock) -> Replay | None:
    """Return what is still to be replayed; None if that is nothing.

    Raise UnanswerableError if the journal is damaged, is needed and lies elsewhere, or cannot be foretold.
    """
    if not superblock.has_journal or not superblock.journal_inode:
        if superblock.needs_recovery:
            raise UnanswerableError("its journal is on another device and has not been replayed; run e2fsck")
        return None
    journal = JournalFile(reader, superblock.journal_inode)
    header = _read_header(journal)
    fast_commit = superblock.fast_commit or _Incompat.FAST_COMMIT in header.incompat
    if fast_commit and (superblock.needs_recovery or header.start):
        raise UnanswerableError("its journal has not been replayed and may hold fast commits; mount it or run e2fsck")
    if not header.start:
        return None
    if _Compat.CHECKSUM in header.compat or _Incompat.ASYNC_COMMIT in header.incompat:
        raise UnanswerableError("its journal has not been replayed and commits asynchronously; run e2fsck")
    return _Log(journal, header).read()


@dataclasses.dataclass(frozen=True)
class _Header:
    """The journal's superblock. Lengths and positions are blocks of the journal."""

    length: int
    first: int
    """The first block of the ring; the last is `length - 1`."""
    sequence: int
    start: int
    """Where the log begins; 0 if it is empty."""
    compat: _Compat
    incompat: _Incompat
    seed: int

    @property
    def checksummed(self) -> bool:
        return bool(self.incompat & (_Incompat.CSUM_V2 | _Incompat.CSUM_V3))


def _read_header(journal: JournalFile) -> _Header:
    """Return the journal's superblock; raise UnanswerableError if it is damaged or has an unknown feature."""
    raw = journal.reader.read(journal.blocks[:1])[0, :1024].tobytes()
    magic, kind, _, block_size, length, first, sequence, start, failed = struct.unpack_from(">9I", raw)
    if magic != _MAGIC or kind not in (_SUPERBLOCK_1, _SUPERBLOCK_2) or block_size != journal.layout.block_size:
        raise UnanswerableError("the journal's superblock is damaged")
    features = struct.unpack_from(">3I", raw, 0x24) if kind == _SUPERBLOCK_2 else (0, 0, 0)
    known = sum(_Compat), sum(_Incompat), 0
    if any(found & ~mask for found, mask in zip(features, known, strict=True)):
        raise UnanswerableError("the journal has unknown features")
    header = _Header(
        length=length,
        first=first,
        sequence=sequence,
        start=start,
        compat=_Compat(features[0]),
        incompat=_Incompat(features[1]),
        seed=crc32c().of(raw[0x30:0x40]),
    )
    if header.checksummed:
        stored = struct.unpack_from(">I", raw, 0xFC)[0]
        # s_checksum_type 4 is crc32c, the only one that the second and third form of checksums know.
        if raw[0x50] != 4 or crc32c().of(raw[:0xFC] + bytes(4) + raw[0x100:]) != stored:
            raise UnanswerableError("the checksum of the journal's superblock is wrong")
    fits = 0 < first < length <= journal.blocks.size and (not start or first <= start < length)
    if not fits or (_Incompat.CSUM_V2 | _Incompat.CSUM_V3) in header.incompat:
        raise UnanswerableError("the journal's superblock is damaged")
    if failed:
        raise UnanswerableError(f"its journal was aborted (error {failed}); run e2fsck")
    return header


# What is remembered of a copy: the block that it is of, the block that it lies in, and what its tag says of it.
_COPY = np.dtype([("target", "i8"), ("copy", "i8"), ("transaction", "u4"), ("checksum", "u4"), ("escaped", "?")])
_REVOKED = np.dtype([("target", "i8"), ("transaction", "u4")])
Copies = np.ndarray[tuple[int], np.dtype[np.void]]


class _Log:
    """The log of a journal, read from its beginning to the last commit."""

    def __init__(self, journal: JournalFile, header: _Header) -> None:
        self.journal = journal
        self.reader = journal.reader
        self.header = header
        self.ring = journal.blocks[header.first : header.length]
        self.position = header.start - header.first
        self.passed = 0
        self.remembered = 0

    def read(self) -> Replay | None:
        """Return all copies that a replay would write; None if there are none."""
        copies, revoked = [np.empty(0, _COPY)], [np.empty(0, _REVOKED)]
        transaction = 0
        begun: tuple[list[Copies], list[Copies]] = [], []
        while (block := self._next_block(self.header.sequence + transaction & 0xFFFFFFFF)) is not None:
            kind = struct.unpack_from(">I", block, 4)[0]
            if kind == _DESCRIPTOR:
                begun[0].append(self._read_tags(block, transaction))
            elif kind == _REVOCATION:
                begun[1].append(self._read_revocations(block, transaction))
            elif kind == _COMMIT:
                self._verify(block, 16)
                self._verify_copies(begun[0], struct.unpack_from("4s", block, 8)[0])
                copies += begun[0]
                revoked += begun[1]
                transaction, begun = transaction + 1, ([], [])
            else:
                break
        return _combine(np.concatenate(copies), np.concatenate(revoked))

    def _take(self, count: int) -> Offsets:
        """Return the filesystem's blocks behind the next `count` of the log, and pass them."""
        self.passed += count
        if self.passed > self.ring.size:
            raise UnanswerableError("the journal's log runs in a circle")
        taken = (self.position + np.arange(count)) % self.ring.size
        self.position = (self.position + count) % self.ring.size
        return self.ring[taken]

    def _next_block(self, sequence: int) -> bytes | None:
        """Return the next of the log's own blocks; None if it is not one of this transaction: the log ends here."""
        if self.passed == self.ring.size:
            return None
        block = self.reader.read(self._take(1))[0].tobytes()
        magic, _, number = struct.unpack_from(">3I", block)
        return block if (magic, number) == (_MAGIC, sequence) else None

    def _verify(self, block: bytes, offset: int) -> None:
        """Raise UnanswerableError if a log block's checksum, over all of it but itself, is wrong."""
        if self.header.checksummed:
            stored = struct.unpack_from(">I", block, offset)[0]
            if crc32c().of(block[:offset] + bytes(4) + block[offset + 4 :], self.header.seed) != stored:
                raise UnanswerableError("a checksum in the journal's log is wrong; run e2fsck")

    def _body(self, block: bytes) -> int:
        """Return where the entries of a descriptor or revocation block end, its checksum verified."""
        if not self.header.checksummed:
            return len(block)
        self._verify(block, len(block) - 4)
        return len(block) - 4

    def _read_tags(self, block: bytes, transaction: int) -> Copies:
        """Return the copies that follow a descriptor block, by its tags."""
        incompat, end = self.header.incompat, self._body(block)
        third = _Incompat.CSUM_V3 in incompat
        wide = _Incompat.SIXTY_FOUR_BIT in incompat
        size = 16 if third else 8 + 4 * wide + 2 * (_Incompat.CSUM_V2 in incompat)
        found, offset, flags = [], 12, 0
        while offset + size <= end and not flags & _LAST_TAG:
            low, checksum, flags = struct.unpack_from(">IHH", block, offset)
            high = struct.unpack_from(">I", block, offset + 8)[0] if wide else 0
            if low | high << 32 >= self.journal.layout.blocks:
                raise UnanswerableError("its journal holds a resize that has not been replayed; mount it or run e2fsck")
            if third:
                checksum = struct.unpack_from(">I", block, offset + 12)[0]
            found.append((low | high << 32, 0, transaction, checksum, flags & _ESCAPED))
            # The uuid of the journal's user follows a tag unless it is the same as before.
            offset += size if flags & _SAME_UUID else size + 16
        self._remember(len(found))
        copies = np.array(found, _COPY)
        copies["copy"] = self._take(len(found))
        return copies

    def _read_revocations(self, block: bytes, transaction: int) -> Copies:
        """Return the blocks of which no copy up to this transaction is to be replayed."""
        end = struct.unpack_from(">I", block, 12)[0]
        form, width = (">u8", 8) if _Incompat.SIXTY_FOUR_BIT in self.header.incompat else (">u4", 4)
        if not 16 <= end <= self._body(block):
            raise UnanswerableError("a revocation in the journal's log is damaged; run e2fsck")
        revoked = np.empty((end - 16) // width, _REVOKED)
        self._remember(revoked.size)
        revoked["target"] = np.frombuffer(block, form, revoked.size, 16)
        revoked["transaction"] = transaction
        return revoked

    def _remember(self, count: int) -> None:
        """Count what is kept of the log; raise UnanswerableError when it becomes too much."""
        self.remembered += count
        if self.remembered > _MOST_REMEMBERED:
            raise UnanswerableError("its journal holds too much that has not been replayed; mount it or run e2fsck")

    def _verify_copies(self, transaction: list[Copies], sequence: bytes) -> None:
        """Raise UnanswerableError if the checksum of any copy of a transaction is wrong."""
        if not self.header.checksummed:
            return
        seed = crc32c().of(sequence, self.header.seed)
        mask = 0xFFFFFFFF if _Incompat.CSUM_V3 in self.header.incompat else 0xFFFF
        step = max(_VERIFIED_AT_ONCE // self.journal.layout.block_size, 1)
        for copies in transaction:
            for first in range(0, copies.size, step):
                piece = copies[first : first + step]
                if ((crc32c().rows(self.reader.read(piece["copy"]), seed) & mask) != piece["checksum"]).any():
                    raise UnanswerableError("a checksum in the journal's log is wrong; run e2fsck")


def _combine(copies: Copies, revoked: Copies) -> Replay | None:
    """Return the copies, in order, without those of a block that the same or a later transaction revokes."""
    if revoked.size:
        blocks, latest = np.unique(revoked["target"][::-1], return_index=True)
        until = revoked["transaction"][::-1][latest]
        index = np.minimum(np.searchsorted(blocks, copies["target"]), blocks.size - 1)
        copies = copies[(blocks[index] != copies["target"]) | (copies["transaction"] > until[index])]
    return Replay(copies["target"], copies["copy"], copies["escaped"]) if copies.size else None
