"""How an image is laid out in segments: names, stamps and what counts as complete."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry.segments import (
    Segments,
    check_complete,
    directory_name,
    new_stamp,
    segment_kinds,
    segment_name,
    segment_number,
    stamps_from_bytes,
    stamps_to_bytes,
    unit_for,
)

UNIT = 4096
SIZES = st.integers(1, 40 * UNIT)
PAIRS = st.lists(st.tuples(st.integers(0, 40 * UNIT), st.integers(0, 9 * UNIT)), max_size=6)


def test_the_names_are_the_offsets_in_the_image() -> None:
    assert segment_name(256, 4 << 20) == "0000000040000000"
    assert [directory_name(number) for number in (0, 255, 256)] == ["000000", "000000", "000001"]
    assert unit_for(1 << 40) == 4 << 20
    assert unit_for((1 << 40) + 1) == 16 << 20


@given(number=st.integers(0, 1 << 24), unit=st.sampled_from([4 << 20, 16 << 20]))
def test_a_name_leads_back_to_its_segment_and_no_other_name_does(number: int, unit: int) -> None:
    assert segment_number(directory_name(number), segment_name(number, unit), unit) == number
    for directory, name in (
        (directory_name(number + 256), segment_name(number, unit)),
        (directory_name(number), f"{number * unit + 512:016x}"),
        (directory_name(number), f"{number * unit:x}x"),
        (directory_name(number), f" {number * unit:015x}"),
        (directory_name(number), f"f{number * unit:015x}"),
    ):
        with pytest.raises(ValueError, match=r"is not a segment|invalid literal"):
            segment_number(directory, name, unit)


@given(size=SIZES, data=PAIRS, same=PAIRS)
def test_a_segment_is_of_the_kind_that_its_bytes_need(
    size: int, data: list[tuple[int, int]], same: list[tuple[int, int]]
) -> None:
    block_map = BlockMap.build(size, data=ExtentSet.from_pairs(data), same=ExtentSet.from_pairs(same))
    kinds = segment_kinds(block_map, UNIT)
    assert len(kinds) == -(-size // UNIT)
    for number, kind in enumerate(kinds.tolist()):
        inside = [
            each.clip(number * UNIT, (number + 1) * UNIT) for each in map(block_map.extents, (Kind.DATA, Kind.SAME))
        ]
        assert kind == (Kind.DATA if inside[0] else Kind.SAME if inside[1] else Kind.ZERO)


@given(st.lists(st.sampled_from([0, 1, 1_700_000_000_123_456_789, 2**62]), max_size=300))
def test_stamps_survive_being_stored(values: list[int]) -> None:
    stamps = np.array(values, np.int64)
    assert stamps_from_bytes(stamps_to_bytes(stamps), len(values), "here").tolist() == values


@given(st.lists(st.sampled_from([0, 5, 6]), min_size=1, max_size=50), st.data())
@settings(max_examples=200)
def test_damaged_stamps_are_refused_or_of_the_right_number(values: list[int], data: st.DataObject) -> None:
    stored = bytearray(stamps_to_bytes(np.array(values, np.int64)))
    position = data.draw(st.integers(0, len(stored) - 1))
    stored[position] ^= data.draw(st.integers(1, 255))
    try:
        assert len(stamps_from_bytes(bytes(stored), len(values), "here")) == len(values)
    except DamagedSnapshotError as error:
        assert "here" in str(error)
    with pytest.raises(DamagedSnapshotError):
        stamps_from_bytes(bytes(stored[: len(stored) // 2]), len(values), "here")


def test_a_stamp_is_new_for_data_and_the_base_s_for_what_is_the_same() -> None:
    base = Segments.plan(BlockMap.build(10 * UNIT, data=ExtentSet.whole(6 * UNIT)), UNIT, 111, None)
    assert base.stamps.tolist() == [111] * 6 + [0] * 4
    block_map = BlockMap.build(
        10 * UNIT, data=ExtentSet.from_pairs([(UNIT + 5, 1), (8 * UNIT, 1)]), same=ExtentSet.whole(3 * UNIT)
    )
    assert Segments.plan(block_map, UNIT, 222, base.stamps).stamps.tolist() == [111, 222, 111, *[0] * 5, 222, 0]
    assert len({new_stamp() for _ in range(1000)}) > 990


@given(size=SIZES, data=PAIRS, lost=st.integers(0, 40))
def test_a_snapshot_is_complete_if_every_segment_that_is_needed_is_there(
    size: int, data: list[tuple[int, int]], lost: int
) -> None:
    block_map = BlockMap.build(size, data=ExtentSet.from_pairs(data))
    numbers = np.flatnonzero(segment_kinds(block_map, UNIT) != Kind.ZERO)
    lengths = np.minimum(UNIT, size - numbers * UNIT)
    check_complete(block_map, UNIT, numbers, lengths, "here")
    if numbers.size:
        lost %= numbers.size
        with pytest.raises(DamagedSnapshotError, match=f"the first at {int(numbers[lost]) * UNIT}"):
            check_complete(block_map, UNIT, np.delete(numbers, lost), np.delete(lengths, lost), "here")
        lengths[lost] -= 1
        with pytest.raises(DamagedSnapshotError, match="1 of"):
            check_complete(block_map, UNIT, numbers, lengths, "here")
