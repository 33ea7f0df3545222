"""The checksums of ext4: crc32c (`metadata_csum`) and crc16 (`uninit_bg`), of many equally long rows at once.

Both are reflected CRCs without a final inversion; the register is seeded by what went before (the kernel's
Documentation/filesystems/ext4/checksums.rst). numpy has no CRC and the standard library none of these two, so the
rows advance in step, four bytes a time, by two tables of 65,536 entries: 700 MB/s for a batch of bitmaps.

A CRC is linear over GF(2). That gives the second trick: long rows are cut into segments that are summed side by side,
and a segment's register is carried over what follows it by a 32 x 32 bit matrix.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Registers = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.uint8]

_WIDTH = 8192  # rows summed side by side: their registers and the lines they are read from stay in the second cache
_BITS = np.arange(32, dtype=np.uint32)


class Crc:
    """One CRC, by its reflected polynomial."""

    def __init__(self, polynomial: int) -> None:
        self._byte = np.arange(256, dtype=np.uint32)
        for _ in range(8):
            self._byte = np.where(self._byte & 1, (self._byte >> 1) ^ np.uint32(polynomial), self._byte >> 1)
        self._high = self._table(2)
        self._low = self._table(4)

    def _table(self, steps: int) -> Registers:
        """Return what a register of 16 bits becomes over some bytes of zeros: the sum of what its halves become."""
        low = np.arange(256, dtype=np.uint32)
        high = low << np.uint32(8)
        for _ in range(steps):
            low, high = (self._byte[half & 0xFF] ^ (half >> 8) for half in (low, high))
        table: Registers = (high[:, None] ^ low).reshape(-1)
        return table

    def of(self, data: bytes, register: int = 0xFFFFFFFF) -> int:
        """Return the register after one piece of data."""
        return int(self.rows(np.frombuffer(data, np.uint8).reshape(1, -1), register)[0])

    def rows(self, rows: Rows, register: int | Registers = 0xFFFFFFFF) -> Registers:
        """Return each row's register: `rows` is (count, length), `register` what they begin with, one or `count`."""
        count, length = rows.shape
        registers = np.empty(count, np.uint32)
        registers[:] = register
        words = np.ascontiguousarray(rows[:, : length // 4 * 4]).view("<u4")
        cuts = 1
        while count * cuts < _WIDTH and words.shape[1] % (2 * cuts) == 0 and words.shape[1] // cuts > 16:
            cuts *= 2
        registers = self._segments(words, cuts, registers)
        for column in range(length // 4 * 4, length):
            registers = self._byte[(registers ^ rows[:, column]) & 0xFF] ^ (registers >> 8)
        return registers

    def _segments(self, words: npt.NDArray[np.uint32], cuts: int, begin: Registers) -> Registers:
        """Return the registers of rows of words, each cut into `cuts` segments that are summed side by side."""
        count, length = words.shape
        registers = np.zeros((count, cuts), np.uint32)
        registers[:, 0] = begin
        registers = self._words(words.reshape(count * cuts, length // cuts), registers.reshape(-1))
        # What 2**i in the register becomes over a segment of zeros: the matrix that carries a register past it.
        zeros = np.zeros((32, length // cuts if cuts > 1 else 0), np.uint32)
        carry = self._words(zeros, np.uint32(1) << _BITS)
        while registers.size > count:
            pairs = registers.reshape(-1, 2)
            registers = _apply(carry, pairs[:, 0]) ^ pairs[:, 1]
            carry = _apply(carry, carry)
        return registers

    def _words(self, words: npt.NDArray[np.uint32], registers: Registers) -> Registers:
        """Advance all registers through their rows, a word a step."""
        for column in range(words.shape[1]):
            registers = registers ^ words[:, column]
            # "clip" only spares the check of indexes that cannot be out of range.
            low = self._low.take(registers & 0xFFFF, mode="clip")
            registers = low ^ self._high.take(registers >> 16, mode="clip")
        return registers


def _apply(matrix: Registers, registers: Registers) -> Registers:
    """Return the matrix, given by its 32 columns, times each register."""
    chosen = np.where((registers[:, None] >> _BITS) & 1, matrix, np.uint32(0))
    product: Registers = np.bitwise_xor.reduce(chosen, axis=1)
    return product


@functools.cache
def crc32c() -> Crc:
    """Return Castagnoli's CRC (iSCSI, RFC 3720 appendix B.4)."""
    return Crc(0x82F63B78)


@functools.cache
def crc16() -> Crc:
    """Return the CRC-16 of the kernel's lib/crc16 (polynomial x^16 + x^15 + x^2 + 1)."""
    return Crc(0xA001)
