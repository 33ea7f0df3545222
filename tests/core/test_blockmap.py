"""Block maps: three kinds of bytes, in borg's text and in the stored form."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry import blockmap
from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet

SPACE = 64
kinds = st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=SPACE)


def map_of(each: list[Kind]) -> BlockMap:
    return BlockMap(np.arange(len(each) + 1, dtype=np.int64), np.array(each, np.uint8))


def each_byte(found: BlockMap) -> list[Kind]:
    return [kind for _start, length, kind in found for _ in range(length)]


@given(kinds)
def test_a_map_is_its_bytes(each):
    found = map_of(each)
    assert each_byte(found) == each
    neighbours = itertools.pairwise(found.kinds)
    assert all(a != b for a, b in neighbours)
    rebuilt = BlockMap.build(len(each), data=found.extents(Kind.DATA), same=found.extents(Kind.SAME))
    assert rebuilt == found


@given(kinds)
def test_both_forms_give_the_map_back(each):
    found = map_of(each)
    assert BlockMap.from_lines(found.to_lines()) == found
    assert BlockMap.from_bytes(found.to_bytes()) == found


@given(kinds, st.integers(1, 9))
def test_on_a_grid_a_chunk_is_read_if_any_byte_of_it_is(each, unit):
    grid = each_byte(map_of(each).on_grid(unit))
    for start in range(0, len(each), unit):
        chunk = each[start : start + unit]
        wanted = Kind.DATA if Kind.DATA in chunk else Kind.SAME if Kind.SAME in chunk else Kind.ZERO
        assert grid[start : start + unit] == [wanted] * len(chunk)


def test_a_byte_that_is_data_and_same_is_read():
    found = BlockMap.build(10, data=ExtentSet.from_pairs([(2, 4)]), same=ExtentSet.from_pairs([(0, 10)]))
    assert found.to_lines() == "0 2 same\n2 4 data\n6 4 same\n"


@pytest.mark.parametrize(
    "text", ["0 5 data\n6 5 zero\n", "1 5 data\n", "0 0 data\n", "0 5 hole\n", "0 5\n", "a b data\n", "0 -5 data\n"]
)
def test_a_text_that_is_no_map_is_refused_with_its_line(text):
    with pytest.raises(ValueError, match="line"):
        BlockMap.from_lines(text)


@given(st.binary(max_size=200))
def test_damaged_stored_maps_are_refused(noise):
    with pytest.raises(ValueError, match="map"):
        BlockMap.from_bytes(noise)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_in_a_stored_map_is_found_or_harmless(position, mask):
    whole = BlockMap.build(1 << 30, data=ExtentSet.from_pairs([(i * 8192, 4096) for i in range(1000)]))
    stored = bytearray(whole.to_bytes())
    stored[position % len(stored)] ^= mask
    try:
        found = BlockMap.from_bytes(bytes(stored))
    except ValueError:
        return
    assert found == whole, "zlib's checksum lets nothing else through"


def test_a_small_stored_map_that_expands_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(blockmap, "_LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="larger than any"):
        BlockMap.from_bytes(b"blockferry map 1\n" + zlib.compress(bytes(10 << 20)))
