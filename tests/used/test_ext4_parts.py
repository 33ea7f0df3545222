"""The arithmetic below the ext4 reader: runs of set bits, checksums of many rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.extents import ExtentSet
from blockferry.used.checksum import crc16, crc32c
from blockferry.used.ext4 import reader as ext4


@given(st.binary(max_size=200))
def test_runs_of_set_bits_are_those_of_the_bits_one_by_one(bitmap: bytes) -> None:
    array = np.frombuffer(bitmap, np.uint8)
    starts, ends = ext4.set_runs(array)
    bits = np.unpackbits(array, bitorder="little").astype(bool)
    assert ExtentSet(starts, ends) == ExtentSet.from_bits(bits, 1)


def test_checksums_are_those_of_the_standards() -> None:
    # The check values of the catalogue of parametrised CRC algorithms: CRC-32/ISCSI and CRC-16/ARC.
    assert crc32c().of(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc16().of(b"123456789", 0) == 0xBB3D


@settings(deadline=None)
@given(rows=st.integers(1, 40), length=st.integers(0, 600), seed=st.integers(0, 2**32 - 1))
def test_checksums_of_many_rows_are_those_of_each_byte_by_byte(rows: int, length: int, seed: int) -> None:
    content = np.random.default_rng(seed).integers(0, 256, (rows, length * 4 % 1031), dtype=np.uint8)
    for crc, polynomial in ((crc32c(), 0x82F63B78), (crc16(), 0xA001)):
        begin = seed & (0xFFFFFFFF if polynomial > 0xFFFF else 0xFFFF)
        register = begin
        for byte in content[-1].tolist():
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (polynomial if register & 1 else 0)
        assert crc.rows(content, begin)[-1] == register
