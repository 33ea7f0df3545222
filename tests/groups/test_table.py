"""The table of a group's files: what is stored comes back, and what somebody made up leads nowhere."""

from __future__ import annotations

import dataclasses
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockferry.errors import DamagedSnapshotError
from blockferry.groups.names import shown
from blockferry.groups.table import GONE, FileTable, pack_attributes, unpack_attributes
from groups_support import DIRECTORY, FILE, LINK, group_of, make_tree, table_of

IMAGE = 1 << 20


def read(table: FileTable) -> FileTable:
    return FileTable.from_bytes(table.to_bytes(), IMAGE, "repository")


def sound() -> FileTable:
    return table_of(
        {"name": b"d", "mode": DIRECTORY},
        {"name": b"f", "parent": 1, "size": 9000, "extents": [(0, 4096, 0, 1), (8192, 808, 4096, -1)]},
        {"name": b"same", "parent": 0, "link": 2, "size": 9000},
        {"name": b"l", "mode": LINK, "text": 0, "attributes": 1},
        texts=(b"d/f", pack_attributes({b"user.a": b"1"})),
    )


@pytest.mark.root
def test_a_real_tree_comes_back_from_its_stored_form(tmp_path: Path) -> None:
    table = group_of(make_tree(tmp_path / "tree")).table
    again = FileTable.from_bytes(table.to_bytes(), 1 << 40, "again")
    assert len(table.to_bytes()) == table.stored_size
    assert np.array_equal(again.entries, table.entries)
    assert np.array_equal(again.extents, table.extents)
    assert list(again.paths()) == [table.path(row) for row in range(len(table))]
    assert [again.attributes(row) for row in range(len(table))] == [table.attributes(row) for row in range(len(table))]
    found = {path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*")}
    assert {path.decode("utf-8", "surrogateescape") for path in table.paths()} == found | {""}


def test_a_hard_link_has_the_extents_of_the_first_one() -> None:
    table = read(sound())
    assert table.extents_of(3).tolist() == table.extents_of(2).tolist() != []
    assert table.target(4) == b"d/f"
    assert table.attributes(4) == {b"user.a": b"1"}


@pytest.mark.parametrize(
    ("what", "entries"),
    [
        ("..", [{"name": b".."}]),
        (".", [{"name": b"."}]),
        ("a slash", [{"name": b"a/b"}]),
        ("a NUL", [{"name": b"a\0b"}]),
        ("no name", [{"name": b""}]),
        ("a long name", [{"name": b"n" * 256}]),
        ("its own parent", [{"name": b"a", "mode": DIRECTORY, "parent": 1}]),
        ("a cycle", [{"name": b"a", "mode": DIRECTORY, "parent": 2}, {"name": b"b", "mode": DIRECTORY, "parent": 1}]),
        ("a second root", [{"name": b"a", "mode": DIRECTORY, "parent": -1}]),
        ("below a symbolic link", [{"name": b"a", "mode": LINK, "text": 0}, {"name": b"b", "parent": 1}]),
        ("below a file", [{"name": b"a"}, {"name": b"b", "parent": 1}]),
        ("a parent that is not there", [{"name": b"a", "parent": 99}]),
        (
            "a hard link to a directory",
            [{"name": b"a", "mode": DIRECTORY}, {"name": b"b", "mode": DIRECTORY, "link": 1}],
        ),
        ("a hard link to the root", [{"name": b"b", "mode": DIRECTORY, "link": 0}]),
        ("a hard link to another kind", [{"name": b"a", "mode": LINK, "text": 0}, {"name": b"b", "link": 1}]),
        ("a hard link to a hard link", [{"name": b"a"}, {"name": b"b", "link": 1}, {"name": b"c", "link": 2}]),
        ("a hard link to a later one", [{"name": b"a", "link": 2}, {"name": b"b"}]),
        ("a hard link to nothing", [{"name": b"a", "link": -2}]),
        ("a symbolic link without a text", [{"name": b"a", "mode": LINK}]),
        ("a text out of bounds", [{"name": b"a", "mode": LINK, "text": 5}]),
        ("attributes out of bounds", [{"name": b"a", "attributes": -7}]),
        ("a target with a NUL", [{"name": b"a", "mode": LINK, "text": 2}]),
        ("attributes that are cut off", [{"name": b"a", "attributes": 0}]),
        ("no kind", [{"name": b"a", "mode": 0o644}]),
        ("more than a mode", [{"name": b"a", "mode": FILE | 1 << 20}]),
        ("a negative size", [{"name": b"a", "size": -1}]),
        ("an extent beyond the image", [{"name": b"a", "extents": [(0, 4096, IMAGE - 4095, -1)]}]),
        ("an extent before the image", [{"name": b"a", "extents": [(0, 4096, -1, -1)]}]),
        ("an extent beyond the file", [{"name": b"a", "size": 4095, "extents": [(0, 4096, 0, -1)]}]),
        ("an extent before the file", [{"name": b"a", "extents": [(-1, 4096, 0, -1)]}]),
        ("an extent without a byte", [{"name": b"a", "extents": [(0, 0, 0, -1)]}]),
        ("a negative length", [{"name": b"a", "extents": [(0, -1, 0, -1)]}]),
        ("overlapping extents", [{"name": b"a", "extents": [(0, 4096, 0, -1), (4095, 4096, 8192, -1)]}]),
        ("numbers that wrap around", [{"name": b"a", "extents": [(1 << 62, 1 << 62, 0, -1)]}]),
        ("places that wrap around", [{"name": b"a", "size": 1 << 62, "extents": [(0, 1 << 62, 1 << 62, -1)]}]),
        ("a directory with content", [{"name": b"a", "mode": DIRECTORY, "extents": [(0, 1, 0, -1)]}]),
        ("a hard link with content", [{"name": b"a"}, {"name": b"b", "link": 1, "extents": [(0, 1, 0, -1)]}]),
    ],
)
def test_a_table_that_leads_elsewhere_is_refused(what: str, entries: list[dict[str, object]]) -> None:
    del what
    table = table_of(*entries, texts=(b"target", b"", b"a\0b"))
    with pytest.raises(DamagedSnapshotError, match="repository: the table"):
        read(table)


@pytest.mark.parametrize(
    "ends",
    [[0, 1, 1 << 62, -(1 << 62) - 9, 7], [0, -1, 2, 6, 7], [0, 1, 2, 6, 8], [0, 9, 2, 6, 7], [1, 2, 3, 6, 7]],
)
def test_ends_of_names_that_go_back_or_beyond_are_refused(ends: list[int]) -> None:
    table = dataclasses.replace(sound(), name_ends=np.array(ends, np.int64))
    with pytest.raises(DamagedSnapshotError):
        read(table)


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("count", [0, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_counts_that_are_made_up_allocate_nothing(column: int, count: int) -> None:
    stored = bytearray(sound().to_bytes())
    place = stored.index(b"\n") + 1 + 8 * column
    stored[place : place + 8] = count.to_bytes(8, "little")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSnapshotError):
            FileTable.from_bytes(bytes(stored), IMAGE, "repository")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_follows_a_table_is_no_part_of_it() -> None:
    stored = sound().to_bytes()
    assert FileTable.from_bytes(stored + bytes(500), IMAGE, "repository").to_bytes() == stored


def test_a_symbolic_link_that_was_removed_before_it_was_read_needs_no_target() -> None:
    assert len(read(table_of({"name": b"a", "mode": LINK, "flags": GONE}))) == 2


@pytest.mark.parametrize("length", range(0, sound().stored_size, 7))
def test_a_table_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(DamagedSnapshotError):
        FileTable.from_bytes(sound().to_bytes()[:length], IMAGE, "repository")


def in_bounds(table: FileTable) -> None:
    """Follow everything that a table says."""
    paths = list(table.paths())
    for row, path in enumerate(paths):
        assert path == table.path(row)
        assert not {b"", b".", b".."} & set(path.split(b"/")[: -1 if row == 0 else None])
        assert b"\0" not in path
        table.attributes(row)
        for extent in table.extents_of(row):
            assert extent["length"] > 0
            assert 0 <= extent["place"] <= IMAGE - extent["length"]
            assert extent["logical"] >= 0
        if stat.S_ISLNK(int(table.entries["mode"][row])):
            assert table.target(row)


def bent(change: Callable[[bytearray], None]) -> None:
    stored = bytearray(sound().to_bytes())
    change(stored)
    try:
        table = FileTable.from_bytes(bytes(stored), IMAGE, "repository")
    except DamagedSnapshotError:
        return
    in_bounds(table)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, sound().stored_size - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_are_noticed_or_stay_in_bounds(changes: list[tuple[int, int]]) -> None:
    def flip(stored: bytearray) -> None:
        for place, byte in changes:
            stored[place] = byte

    bent(flip)


INTERESTING = [0, 1, 2, 5, 4096, -1, -2, 1 << 31, 1 << 61, 1 << 62, (1 << 63) - 1, -(1 << 63), 0o040755, 0o120777]


@settings(max_examples=600, deadline=None)
@given(st.integers(0, sound().stored_size - 8), st.sampled_from(INTERESTING), st.sampled_from([4, 8]))
def test_numbers_at_their_limits_are_noticed_or_stay_in_bounds(place: int, number: int, width: int) -> None:
    def replace(stored: bytearray) -> None:
        stored[place : place + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    bent(replace)


@given(st.dictionaries(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name), st.binary()))
def test_attributes_come_back_as_they_were(attributes: dict[bytes, bytes]) -> None:
    assert unpack_attributes(pack_attributes(attributes)) == attributes


@given(st.binary(min_size=1).filter(lambda path: b"\0" not in path), st.binary(min_size=1))
def test_paths_are_shown_on_one_line_and_different_ones_differently(path: bytes, other: bytes) -> None:
    assert shown(path).isprintable()
    assert (shown(path) == shown(other)) == (path == other)
