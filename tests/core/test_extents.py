"""Extent sets against the plainest possible model: a set of byte numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.extents import ExtentSet

SPACE = 64
bytes_of = st.sets(st.integers(0, SPACE - 1))


def extents(members: set[int]) -> ExtentSet:
    return ExtentSet.from_pairs([(each, 1) for each in members])


def members(found: ExtentSet) -> set[int]:
    return {each for start, length in found for each in range(start, start + length)}


def assert_canonical(found: ExtentSet) -> None:
    assert (found.starts < found.ends).all()
    assert (found.starts[1:] > found.ends[:-1]).all(), "sorted, disjoint, and no two extents touch"


@given(bytes_of, bytes_of)
def test_set_operations_equal_those_of_sets_of_bytes(left, right):
    a, b = extents(left), extents(right)
    for found, wanted in (
        (a.union(b), left | right),
        (a.intersection(b), left & right),
        (a.difference(b), left - right),
        (a.complement(SPACE), set(range(SPACE)) - left),
    ):
        assert_canonical(found)
        assert members(found) == wanted


@given(bytes_of, st.integers(0, SPACE), st.integers(0, SPACE))
def test_clip_and_covers(inside, start, end):
    found = extents(inside).clip(start, end)
    assert_canonical(found)
    assert members(found) == {each for each in inside if start <= each < end}
    assert extents(inside).covers(start, end) == set(range(start, end)).issubset(inside)


@given(bytes_of, st.integers(1, 17))
def test_align_grows_to_the_grid_and_no_further(inside, unit):
    found = extents(inside).align(unit, SPACE)
    assert_canonical(found)
    wanted = {each for byte in inside for each in range(byte // unit * unit, min(SPACE, (byte // unit + 1) * unit))}
    assert members(found) == wanted


@given(bytes_of, st.integers(0, 9))
def test_coalesce_fills_gaps_up_to_a_length(inside, gap):
    found = extents(inside).coalesce(gap)
    assert_canonical(found)
    holes = extents(inside).complement(SPACE)
    inner = [(start, length) for start, length in holes if start and start + length < SPACE and inside]
    filled = {b for start, length in inner if length <= gap for b in range(start, start + length)}
    between = {each for each in filled if min(inside) < each < max(inside)}
    assert members(found) == inside | between


@given(bytes_of, st.integers(1, 20))
def test_batches_are_the_set_in_order_in_pieces_of_bounded_size(inside, most):
    whole = extents(inside)
    pieces = list(whole.batches(most))
    assert ExtentSet.empty().union(*pieces) == whole
    assert all(piece.total == most for piece in pieces[:-1])
    assert all(0 < piece.total <= most for piece in pieces)
    assert all(int(a.end) <= int(b.starts[0]) for a, b in itertools.pairwise(pieces))


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4096), st.integers(0, 9999))
def test_bits_become_extents(bits, unit, offset):
    found = ExtentSet.from_bits(np.array(bits, bool), unit, offset)
    assert_canonical(found)
    assert found == ExtentSet.from_pairs([(offset + i * unit, unit) for i, bit in enumerate(bits) if bit])


@given(st.lists(st.tuples(st.integers(0, SPACE), st.integers(0, 9))))
def test_pairs_may_overlap_and_come_in_any_order(pairs):
    found = ExtentSet.from_pairs(pairs)
    assert_canonical(found)
    assert members(found) == {each for start, length in pairs for each in range(start, start + length)}


def test_ranges_that_are_none_are_refused():
    with pytest.raises(ValueError, match="below zero or ends before"):
        ExtentSet.from_ranges([-1], [5])
    with pytest.raises(ValueError, match="below zero or ends before"):
        ExtentSet.from_ranges([5], [4])


@pytest.mark.thorough
def test_ten_million_extents_are_handled():
    starts = np.arange(10_000_000, dtype=np.int64) * 8192
    a, b = ExtentSet(starts, starts + 4096), ExtentSet(starts + 2048, starts + 6000)
    assert a.union(b).total == 6000 * 10_000_000
    assert a.intersection(b).total == 2048 * 10_000_000
    assert a.difference(b).total == 2048 * 10_000_000
    assert sum(batch.total for batch in a.batches(1 << 30)) == a.total


def test_offsets_of_sixteen_tebibytes_keep_their_value():
    far = ExtentSet.from_pairs([((16 << 40) - 4096, 4096)])
    assert far.end == 16 << 40
    assert far.complement(16 << 40).total == (16 << 40) - 4096
