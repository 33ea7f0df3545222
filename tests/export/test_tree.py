"""The tree of an export, asked without a kernel in between."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import TrackerError, VolumeError
from blockferry.export import witnesses
from blockferry.export.memory import Shown
from blockferry.export.tree import ExportTree
from blockferry.export.view import View
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer, CutLayer
from blockferry.segments import Segments
from blockferry.snapshot import Record, Stability, Tier, new_snapshot_id, now

UNIT = 4096
EXTENTS = st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 9000)), max_size=5)


class BytesLayer(BaseLayer):
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.extents = ExtentSet.whole(self.size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def record_of(name: str, size: int) -> Record:
    return Record(
        snapshot=new_snapshot_id(), created=now(), host="h", volume=name, path=f"/dev/{name}", size=size,
        block_size=512, filesystem="", identity={}, tier=Tier.USED, tier_reason="", method="a test",
        stability=Stability.OFFLINE, freeze="", unit=UNIT, bytes_used=0, bytes_changed=0,
    )  # fmt: skip


def view_of(name: str, content: bytes, used: ExtentSet, *, stamp: int = 1000) -> View:
    block_map = BlockMap.build(len(content), data=used)
    segments = Segments.plan(block_map.on_grid(UNIT), UNIT, stamp, None)
    shown = Shown(record_of(name, len(content)), block_map, segments.stamps, stamp)
    return View(shown, CutLayer(BytesLayer(content), used), lambda: None)


def read(tree: ExportTree, path: str) -> bytes:
    handle, found, offset = tree.open(path), b"", 0
    while True:
        buffer = memoryview(bytearray(1000))
        count = tree.read_into(handle, offset, buffer)
        found += buffer[:count]
        offset += count
        if count < len(buffer):
            return found


def walk(tree: ExportTree, path: str = "/") -> dict[str, int]:
    """Return the inode of each file."""
    found = {}
    for name, node in tree.children(path):
        below = f"{path.rstrip('/')}/{name}"
        assert tree.node(below) == node
        found |= walk(tree, below) if node.is_directory else {below: node.inode}
    return found


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 70_000), pairs=EXTENTS)
def test_the_files_of_both_ways_hold_what_is_in_use_whatever_the_size(size: int, pairs: list[tuple[int, int]]) -> None:
    used = ExtentSet.from_pairs(pairs).clip(0, size)
    content = os.urandom(size)
    expected = bytearray(size)
    for start, length in used:
        expected[start : start + length] = content[start : start + length]
    assert read(ExportTree([view_of("v", content, used)], as_segments=False), "/v.img") == expected
    tree = ExportTree([view_of("v", content, used)], as_segments=True)
    put_together = bytearray(size)
    for path in walk(tree):
        if ".segments/" in path:
            segment, offset = read(tree, path), int(path.rpartition("/")[2], 16)
            assert len(segment) == min(UNIT, size - offset)
            put_together[offset : offset + len(segment)] = segment
    assert put_together == expected
    assert BlockMap.from_bytes(read(tree, "/v.map")).extents(Kind.DATA) == used


@pytest.mark.parametrize("as_segments", [True, False])
def test_a_volume_has_the_same_inodes_whatever_else_is_exported_and_no_two_files_have_one(as_segments: bool) -> None:
    def views(*names: str) -> list[View]:
        return [view_of(name, bytes([len(name)]) * 20_000, ExtentSet.whole(20_000)) for name in names]

    alone = walk(ExportTree(views("a.json"), as_segments=as_segments))
    together = ExportTree(views("b", "a", "a.json", "a.img.segments"), as_segments=as_segments)
    found = walk(together)
    assert alone.items() <= found.items()
    assert len(set(found.values())) == len(found)
    for path in found:
        name = path[1:].partition("/")[0].rpartition(".")[0]
        if not path.endswith((".json", ".map")) or "/" in path[1:]:
            assert read(together, path)[0] == len(name), path


@pytest.mark.parametrize("path", ["/w.img", "/v.img", "/v.segments/000000/0000000000000001", "/v.segments/zz", "/v",
                                  "/v.segments/000001/0000000000000000", "/v.json/x", "/.json"])  # fmt: skip
def test_there_is_nothing_else(path: str) -> None:
    tree = ExportTree([view_of("v", bytes(20_000), ExtentSet.whole(20_000))], as_segments=True)
    with pytest.raises(FileNotFoundError):
        tree.node(path)


def test_after_the_first_failure_no_read_of_that_volume_succeeds() -> None:
    class Failing(BytesLayer):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == UNIT:
                raise VolumeError("the disk is broken")
            super().read_into(offset, buffer)

    bad = view_of("bad", bytes(20_000), ExtentSet.whole(20_000))
    bad.layer = Failing(bytes(20_000))
    good = view_of("good", bytes(20_000), ExtentSet.whole(20_000))
    tree = ExportTree([bad, good], as_segments=True)
    first, second = "/bad.segments/000000/0000000000000000", "/bad.segments/000000/0000000000001000"
    assert len(read(tree, first)) == UNIT
    for path in (second, first):
        with pytest.raises(OSError, match="the disk is broken"):
            read(tree, path)
    assert bad.bytes_read == UNIT
    assert len(read(tree, "/good.segments/000000/0000000000001000")) == UNIT
    assert (bad.failure, good.failure) == ("the disk is broken", "")


def test_what_is_remembered_comes_back_and_what_is_torn_does_not() -> None:
    shown = Shown(
        record_of("v", 9 * UNIT),
        BlockMap.build(9 * UNIT, data=ExtentSet.from_pairs([(UNIT, 5000)]), same=ExtentSet.from_pairs([(0, 7)])),
        np.array([5, 5, 5, 0, 0, 0, 0, 0, 0], np.int64),
        77,
        ((1, 2, "ab"),),
    )
    again = Shown.from_bytes(shown.to_bytes(), "here")
    assert again.to_bytes() == shown.to_bytes()
    assert again.record == shown.record
    assert again.block_map == shown.block_map
    assert again.stamps.tolist() == shown.stamps.tolist()
    assert (again.image_stamp, again.witnesses) == (shown.image_stamp, shown.witnesses)
    for torn in (b"", b"{}", shown.to_bytes()[:-9], b"\n" + shown.to_bytes()):
        with pytest.raises(Exception, match="here"):
            Shown.from_bytes(torn, "here")


def test_a_piece_is_compared_if_all_of_it_is_said_to_be_as_before_and_only_then() -> None:
    size = 4 * witnesses.PIECE
    content = os.urandom(size)
    used = ExtentSet.from_pairs([(0, 2 * witnesses.PIECE), (3 * witnesses.PIECE, 100)])
    drawn = tuple(witnesses.draw(CutLayer(BytesLayer(content), used)))
    assert drawn
    before = Shown(record_of("v", size), BlockMap.build(size, data=used), np.zeros(1, np.int64), 0, drawn)
    same = BlockMap.build(size, data=ExtentSet.empty(), same=used)
    compared = witnesses.compare(CutLayer(BytesLayer(content), used), before, same)
    assert compared == sum(length for _start, length, _digest in drawn)
    other = CutLayer(BytesLayer(os.urandom(size)), used)
    with pytest.raises(TrackerError):
        witnesses.compare(other, before, same)
    changed = BlockMap.build(size, data=used)
    assert witnesses.compare(other, before, changed) == 0
