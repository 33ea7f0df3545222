"""Whether the log of an XFS filesystem still holds changes that are not in place.

The free space btrees on disk are the truth only if no transaction in the log has yet to be replayed into them. The
log is a ring of 512-byte blocks. A record in it is a header (magic number 0xFEEDBABE) and operations; the first word
of every block of a record is replaced by the cycle number, the count of times that the ring was gone round, so that
the head, the place where the next record will go, is where the cycle number drops by one. A record's header names
the tail: the oldest record with a change that was not in place when the record was written. A mount replays what
lies from the tail of the last record to the head. Two kinds of log leave the free space as it is:

- *clean*: the last record is an unmount record. Nothing is replayed.
- *covered*: all that lies between tail and head are copies of the superblock. Freezing (`xfs_freeze`, `fsfreeze`, an
  LVM snapshot) writes every change in place, empties the list of those that wait, and then logs the superblock twice:
  once to move the tail past everything else, once to write that tail down. The log stays dirty on purpose, so that the
  next mount looks for files that were unlinked while open: what that frees is in use until then. Replaying a
  superblock moves counters, or makes the filesystem larger, and what lies beyond its former end counts as in use.

Anything else may hold an allocation that the btrees do not know yet: it needs recovery, and there is no answer. The
same goes for whatever looks odd, such as a record torn by a crash: the kernel mends that, this module does not.

Format: "XFS Algorithms & Data Structures", chapter "Journaling Log" (xfs.org, xfs-documentation); head and tail:
Linux, fs/xfs/xfs_log_recover.c, `xlog_find_head` and `xlog_find_tail`; covering: fs/xfs/xfs_log.c, `xfs_log_cover`.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.layers import Layer
from blockferry.used.checksum import crc32c

_BLOCK = 512
_MAGIC = 0xFEEDBABE
_CYCLE_WORDS = 64
"""The number of first words that one header block keeps: those of 32 KiB of log."""
_CYCLE_BYTES = _CYCLE_WORDS * _BLOCK
_WINDOW = 8 * 256 * 1024 // _BLOCK
"""Blocks that can be in flight at once: eight records of 256 KiB (XLOG_TOTAL_REC_SHIFT)."""
_BATCH = 256 * 1024 // _BLOCK
"""Blocks read at a time around the head."""
_MOST_RECORD = 256 * 1024 // _BLOCK + 8
"""Blocks of the largest record with its headers."""

_HEADER = struct.Struct(">IIIIQQIII256sI16sI")
_HEADER_SIZES = (328, 324)
"""What a record's CRC covers of its header: the structure is padded everywhere but on 32-bit x86."""
_CRC_OFFSET = 32
_EXTENDED_SIZE = 4 + 4 * _CYCLE_WORDS
_OPERATION = struct.Struct(">IIBBH")
_BYTE_ORDER = {1: "<", 2: ">"}
"""h_fmt: the byte order of the machine that wrote the operations' contents."""

_START, _COMMIT, _CONTINUED, _UNMOUNT = 0x01, 0x02, 0x04 | 0x08 | 0x10, 0x20
_LOG_CLIENT = 0xAA
_TRANSACTION_MAGIC = 0x5452414E
_BUFFER_ITEM = 0x123C
_CANCELLED = 0x2

_CORRUPT = "its log cannot be read: "
_DIRTY = "its log needs recovery: "


class XfsError(Exception):
    """The filesystem cannot be answered for; the message is the reason, in words that follow its name."""


@dataclasses.dataclass(frozen=True)
class LogPlace:
    """Where a log is: `offset` and `size` in bytes of the volume; whose it is; whether its records carry CRCs."""

    offset: int
    size: int
    uuid: bytes
    has_crc: bool


def check_replayed(layer: Layer, place: LogPlace) -> None:
    """Return if a mount would change nothing that the free space depends on; else raise XfsError, saying why."""
    log = _Log(layer, place)
    last = log.last_record()
    if log.is_unmount(last):
        return
    for record in log.live_records(last):
        _check_only_superblocks(record)


def check_unmounted(layer: Layer, place: LogPlace) -> None:
    """Return if the log is clean; raise XfsError, saying why, if it is merely covered, or needs recovery."""
    log = _Log(layer, place)
    if not log.is_unmount(log.last_record()):
        raise XfsError(f"{_DIRTY}it was not unmounted")


@dataclasses.dataclass(frozen=True)
class _Record:
    """One record: where it is and what its header says; `header` and `body` are its blocks as they are on disk."""

    block: int
    end: int
    """The block behind it, in the ring."""
    tail: tuple[int, int]
    """Cycle and block of the log's tail when this was written."""
    crc: int
    operations: int
    order: str
    header: bytes
    body: bytes
    length: int

    def matches_crc(self) -> bool:
        """Tell whether the record is as it was written."""
        zeroed = self.header[:_CRC_OFFSET] + bytes(4) + self.header[_CRC_OFFSET + 4 : _BLOCK]
        extended = b"".join(
            self.header[start : start + _EXTENDED_SIZE] for start in range(_BLOCK, len(self.header), _BLOCK)
        )
        texts = [zeroed[:size] + extended + self.body[: self.length] for size in _HEADER_SIZES]
        return any(crc32c().of(text) ^ 0xFFFFFFFF == self.crc for text in texts)

    def contents(self) -> bytes:
        """Return the operations, with the first word of each block put back from the headers."""
        words = np.frombuffer(self.header, ">u4").reshape(-1, _BLOCK // 4)
        # The first header keeps its words at byte 44, an extended one at byte 4.
        kept = np.concatenate([words[0, 11 : 11 + _CYCLE_WORDS], words[1:, 1 : 1 + _CYCLE_WORDS].reshape(-1)])
        body = np.frombuffer(self.body, ">u4").reshape(-1, _BLOCK // 4).copy()
        body[:, 0] = kept[: body.shape[0]]
        return body.tobytes()[: self.length]


class _Log:
    """The ring of blocks, with its head found and the blocks around it checked."""

    def __init__(self, layer: Layer, place: LogPlace) -> None:
        self.layer = layer
        self.place = place
        self.blocks = place.size // _BLOCK
        self.first_cycle = self._cycle(0)
        self.head = self._find_head()
        self._check_around_head()

    def read(self, block: int, count: int) -> bytes:
        """Return `count` blocks from `block` on, around the end of the ring."""
        buffer = bytearray(count * _BLOCK)
        self.read_into(block, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, block: int, buffer: memoryview) -> None:
        """Fill a buffer with the blocks from `block` on, around the end of the ring."""
        before_end = (self.blocks - block) * _BLOCK
        self.layer.read_into(self.place.offset + block * _BLOCK, buffer[:before_end])
        self.layer.read_into(self.place.offset, buffer[before_end:])

    def cycle_at(self, block: int) -> int:
        """Return the cycle number that a block before or behind the head has."""
        return self.first_cycle if block < self.head else self.first_cycle - 1

    def last_record(self) -> _Record:
        """Return the record that ends at the head."""
        count = min(self.blocks, _MOST_RECORD)
        start = (self.head - count) % self.blocks
        words = np.frombuffer(self.read(start, count), ">u4").reshape(count, -1)
        headers = np.flatnonzero(words[:, 0] == _MAGIC)
        if not headers.size:
            raise XfsError(f"{_CORRUPT}no record before its head")
        record = self._record((start + int(headers[-1])) % self.blocks)
        if record.end != self.head % self.blocks:
            raise XfsError(f"{_DIRTY}its last record is torn")
        return record

    def is_unmount(self, record: _Record) -> bool:
        """Tell whether the record says that the filesystem was unmounted; a record that mkfs wrote has no CRC."""
        if record.operations != 1 or record.length < _OPERATION.size:
            return False
        _tid, _length, client, flags, _reserved = _OPERATION.unpack_from(record.contents())
        if client != _LOG_CLIENT or not flags & _UNMOUNT:
            return False
        if self.place.has_crc and record.crc and not record.matches_crc():
            raise XfsError(f"{_CORRUPT}its unmount record fails its checksum")
        return True

    def live_records(self, last: _Record) -> Iterator[_Record]:
        """Yield the records that a mount would replay, oldest first."""
        cycle, block = last.tail
        if block >= self.blocks or cycle != self.cycle_at(block):
            raise XfsError(f"{_CORRUPT}its tail is not in it")
        distance = (self.head - block) % self.blocks
        # Two superblocks take a few blocks: a longer way to go is sure to hold something else.
        if not 0 < distance <= _WINDOW:
            raise XfsError(f"{_DIRTY}it holds {distance * _BLOCK} bytes of changes")
        while distance > 0:
            record = self._record(block)
            if self.place.has_crc and not record.matches_crc():
                raise XfsError(f"{_DIRTY}a record fails its checksum")
            yield record
            distance -= (len(record.header) + len(record.body)) // _BLOCK
            block = record.end
        if distance:
            raise XfsError(f"{_CORRUPT}a record reaches over its head")

    def _cycle(self, block: int) -> int:
        return int(_cycles(self.read(block, 1))[0])

    def _find_head(self) -> int:
        """Return the first block whose cycle is one less than the first block's, or the number of blocks.

        The same bisection as the kernel's, so that both come to the same place even in a log that is not in order.
        """
        last_cycle = self._cycle(self.blocks - 1)
        if self.first_cycle == last_cycle != 0:
            return self.blocks
        if last_cycle != self.first_cycle - 1:
            raise XfsError(f"{_CORRUPT}its cycle numbers are not those of a log")
        low, high = 0, self.blocks - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._cycle(middle) == last_cycle:
                high = middle
            else:
                low = middle
        return high

    def _check_around_head(self) -> None:
        """Check the cycles of all blocks that may have been in flight: a crash leaves some written, some not.

        xfs_repair and xfs_admin format a log with a gap behind its first record, which the next mount fills.
        """
        around = min(self.blocks, 2 * _WINDOW)
        start = (self.head - around // 2) % self.blocks
        buffer = memoryview(mmap.mmap(-1, _BATCH * _BLOCK))
        for done in range(0, around, _BATCH):
            numbers = (start + done + np.arange(min(_BATCH, around - done))) % self.blocks
            piece = buffer[: numbers.size * _BLOCK]
            self.read_into(int(numbers[0]), piece)
            if not np.array_equal(_cycles(piece), self.first_cycle - (numbers >= self.head)):
                raise XfsError(
                    f"{_DIRTY}it was cut off while being written, or a tool formatted it and no mount followed"
                )

    def _record(self, block: int) -> _Record:
        """Return the record whose header is at a block; raise XfsError if what is there is not one."""
        fields = _HEADER.unpack_from(self.read(block, 1))
        magic, cycle, version, length, lsn, tail, crc, _previous, operations, _words, form, uuid, size = fields
        expected = self.cycle_at(block)
        if (magic, cycle, lsn) != (_MAGIC, expected, expected << 32 | block) or version not in (1, 2):
            raise XfsError(f"{_CORRUPT}no record at its block {block}")
        if uuid != self.place.uuid or form not in _BYTE_ORDER:
            raise XfsError(f"{_CORRUPT}the record at its block {block} is another filesystem's or system's")
        header_blocks = max(1, -(-size // _CYCLE_BYTES)) if version == 2 else 1
        body_blocks = -(-length // _BLOCK)
        whole = header_blocks + body_blocks
        if not 0 < length <= header_blocks * _CYCLE_BYTES or whole > min(self.blocks, _MOST_RECORD):
            raise XfsError(f"{_CORRUPT}the record at its block {block} has an impossible length")
        content = self.read(block, whole)
        return _Record(
            block=block,
            end=(block + whole) % self.blocks,
            tail=(tail >> 32, tail & 0xFFFFFFFF),
            crc=int.from_bytes(crc.to_bytes(4, "big"), "little"),
            operations=operations,
            order=_BYTE_ORDER[form],
            header=content[: header_blocks * _BLOCK],
            body=content[header_blocks * _BLOCK :],
            length=length,
        )


def _cycles(blocks: bytes | memoryview) -> npt.NDArray[np.int64]:
    """Return the cycle number of each block: its first word, or the second where a record begins."""
    words = np.frombuffer(blocks, ">u4").reshape(-1, _BLOCK // 4)
    return np.where(words[:, 0] == _MAGIC, words[:, 1], words[:, 0]).astype(np.int64)


def _check_only_superblocks(record: _Record) -> None:
    """Raise XfsError unless every transaction in a record changes nothing but the superblock.

    A transaction is a start, a header, then for each item a format and as many regions as that announces, and a
    commit. The superblock is the buffer at disk address 0; its transactions are far too small to go on in a further
    record, so one that does, or that began before, is not of this kind.
    """
    regions_due: dict[int, int] = {}
    for tid, client, flags, region in _operations(record):
        if client == _LOG_CLIENT and flags & _UNMOUNT:
            continue
        if flags & _START:
            regions_due[tid] = 0
            continue
        if flags & _CONTINUED or tid not in regions_due:
            raise XfsError(f"{_DIRTY}it holds a long transaction")
        if flags & _COMMIT:
            del regions_due[tid]
        elif regions_due[tid]:
            regions_due[tid] -= 1
        elif not _is_transaction_header(region, record.order):
            regions_due[tid] = _superblock_regions(region, record.order)


def _operations(record: _Record) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield transaction id, client, flags and contents of each operation of a record."""
    contents = record.contents()
    position = 0
    for _number in range(record.operations):
        if position + _OPERATION.size > len(contents):
            raise XfsError(f"{_CORRUPT}a record has fewer operations than it says")
        tid, length, client, flags, _reserved = _OPERATION.unpack_from(contents, position)
        position += _OPERATION.size
        if position + length > len(contents):
            raise XfsError(f"{_CORRUPT}an operation reaches over its record's end")
        yield tid, client, flags, contents[position : position + length]
        position += length


def _is_transaction_header(region: bytes, order: str) -> bool:
    return len(region) == 16 and struct.unpack_from(f"{order}I", region)[0] == _TRANSACTION_MAGIC


def _superblock_regions(region: bytes, order: str) -> int:
    """Return how many regions follow the format of a superblock's buffer; raise XfsError if it is of anything else."""
    if len(region) >= 24:
        kind, regions, flags, _blocks, address = struct.unpack_from(f"{order}HHHHq", region)
        if kind == _BUFFER_ITEM and address == 0 and not flags & _CANCELLED and regions >= 1:
            return int(regions) - 1
    raise XfsError(f"{_DIRTY}it holds changes that are not in place yet")
