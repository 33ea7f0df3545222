"""Pictures of volumes: what each cell shows, counted naively, and what a chain or a set is made of."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.blockmap import BlockMap
from blockferry.chain import Chain, Link
from blockferry.cli import bar, drawing
from blockferry.extents import ExtentSet
from blockferry.picture import MOST_OTHERS, Shade, bytes_in_cells, cells, edges, shades_of_chain
from blockferry.snapshot import Snapshot, Tier
from sets_support import common_record

SPACE = 80
SVG = "{http://www.w3.org/2000/svg}"
bytes_of_kinds = st.lists(st.sampled_from(["changed", "group", "used", ""]), min_size=1, max_size=SPACE)


def shades_of(each):
    return [
        Shade(kind, kind, ExtentSet.from_bits(np.array([one == kind for one in each]), 1))
        for kind in ("changed", "group", "used")
    ]


@given(bytes_of_kinds, st.integers(1, 2 * SPACE), st.integers(1, 5))
def test_a_cell_shows_the_first_shade_that_it_has_any_byte_of_and_how_much(each, count, levels):
    shades = shades_of(each)
    shown = cells(len(each), shades, count, levels)
    count = min(count, len(each))
    assert len(shown.shades) == count
    for number in range(count):
        inside = each[len(each) * number // count : len(each) * (number + 1) // count]
        wanted = next((index for index, shade in enumerate(shades) if shade.kind in inside), -1)
        share = inside.count(shades[wanted].kind) * levels if wanted >= 0 else 0
        assert (shown.shades[number], shown.levels[number]) == (wanted, -(-share // len(inside)))


@given(bytes_of_kinds, st.integers(1, SPACE))
def test_the_cells_have_all_bytes_of_a_shade_between_them(each, count):
    for shade in shades_of(each):
        counted = bytes_in_cells(shade.extents, edges(len(each), count))
        naive = [
            each[len(each) * number // count : len(each) * (number + 1) // count].count(shade.kind)
            for number in range(count)
        ]
        assert counted.tolist() == naive


def test_a_block_of_the_largest_volume_is_seen():
    size = (1 << 61) + 4096
    block = ExtentSet.from_pairs([(size // 3, 512)])
    shown = cells(size, [Shade("changed", "", block), Shade("used", "", ExtentSet.whole(size))], 16384, 4)
    assert np.flatnonzero(shown.shades == 0).tolist() == [16384 // 3]
    assert set(shown.levels.tolist()) == {1, 4}


def test_a_million_extents_take_no_time_to_look_at():
    starts = np.arange(1_000_000, dtype=np.int64) * 8192
    used = ExtentSet(starts, starts + 4096)
    counted = bytes_in_cells(used, edges(8192 * 1_000_000, 1000))
    assert set(counted.tolist()) == {4096 * 1000}


# -- in a terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 80, 133])
@pytest.mark.parametrize("marks", [bar.PLAIN, bar.BLOCKS])
def test_lines_are_as_wide_as_the_terminal_and_each_kind_has_signs_of_its_own(width, marks):
    third = 1 << 40
    shades = [
        Shade("changed", "changed", ExtentSet.from_pairs([(0, third)])),
        Shade("group", "of the group", ExtentSet.from_pairs([(third, third)])),
        Shade("used", "in use", ExtentSet.from_pairs([(2 * third, third // 2)])),
    ]
    lines = [line.plain for line in bar.lines(3 * third, shades, width, marks)]
    rows = lines[: lines.index("")]
    assert len(rows) == 8
    assert {len(row) for row in rows} == {width}
    drawn = "".join(row[12:] for row in rows)
    for full in (marks.of["changed"][1], marks.of["group"][1], marks.of["used"][1], marks.nothing):
        assert full in drawn
    signs = [sign for pair in marks.of.values() for sign in pair] + [marks.nothing]
    assert len(set(signs)) == len(signs)


def test_the_plain_signs_are_ascii():
    assert "".join([*bar.PLAIN.of.values(), bar.PLAIN.nothing]).isascii()


# -- as a drawing ------------------------------------------------------------------------------------------------------


def painted(root):
    """Return what each cell of a drawing shows: {(row, column): (kind, level)}."""
    found = {}
    for path in root.find(f"{SVG}g").iter(f"{SVG}path"):
        for run in path.get("d").split("M")[1:]:
            place, length = run.split("h")
            column, row = place.split(" ")
            for number in range(int(length)):
                cell = (int(float(row)), int(column) + number)
                assert cell not in found
                found[cell] = tuple(path.get("class").split())
    return found


@given(st.lists(st.sampled_from(["changed", "group", "used", ""]), min_size=1, max_size=700))
def test_a_drawing_shows_each_cell_once(each):
    size = len(each) * 4096
    shades = [
        Shade(kind, kind, ExtentSet.from_bits(np.array([one == kind for one in each]), 4096))
        for kind in ("changed", "group", "used")
    ]
    root = ET.fromstring(drawing.svg(size, shades, "title", ""))
    wanted = {divmod(number, 128): (kind, "l4") for number, kind in enumerate(each) if kind}
    assert painted(root) == wanted


def test_a_drawing_is_small_however_scattered_a_large_volume_is():
    size = 1 << 50
    starts = np.arange(0, size, size // 200_000, dtype=np.int64)
    shades = [
        Shade("changed", "changed", ExtentSet(starts[::7], starts[::7] + 4096)),
        Shade("used", "used", ExtentSet(starts + 8192, starts + 8192 + 70_000)),
    ]
    assert len(drawing.svg(size, shades, "t", "s")) < 300_000


@pytest.mark.parametrize(
    "name", ["</text><script>alert(1)</script>", "a\x00b\x1b[31m\x0b", "\ud800 & \uffff", "x" * 9000]
)
def test_whatever_a_volume_is_called_the_drawing_is_xml(name):
    shades = [Shade("used", name, ExtentSet.whole(4096))]
    drawn = drawing.svg(1 << 20, shades, name, name)
    root = ET.fromstring(drawn.encode())
    assert {each.tag for each in root.iter()} <= {
        SVG + tag for tag in ("svg", "title", "style", "rect", "text", "g", "path")
    }
    assert len(drawn) < 10_000


# -- what a snapshot is made of ----------------------------------------------------------------------------------------


def link(name, block_map, **fields):
    record = common_record(block_map.size, 4096, **({"snapshot": name} | fields))
    return Link(Snapshot.of(record, name), record, block_map)


def pairs(*each):
    return ExtentSet.from_pairs(each)


def labelled(shades):
    return {shade.label: list(shade.extents) for shade in shades if shade.extents}


def test_of_a_whole_snapshot_what_changed_and_what_was_taken_over():
    whole = link("aa", BlockMap.build(100, data=pairs((0, 10)), same=pairs((50, 20))), tier=Tier.CHANGED, base="00")
    assert labelled(shades_of_chain(Chain((whole,)))) == {"changed: read": [(0, 10)], "in use: as before": [(50, 20)]}


def test_of_a_part_in_which_snapshot_of_its_chain_each_block_is():
    newest = link("cc", BlockMap.build(100, data=pairs((0, 10)), same=pairs((10, 60))), part=True, base="bb")
    middle = link("bb", BlockMap.build(100, data=pairs((5, 15)), same=pairs((20, 70))), part=True, base="aa")
    whole = link("aa", BlockMap.build(100, data=pairs((0, 90))))
    assert labelled(shades_of_chain(Chain((newest, middle, whole)))) == {
        "stored as this part": [(0, 10)],
        "in snapshot bb": [(10, 10)],
        "in snapshot aa": [(20, 50)],
    }


def test_of_a_set_which_hosts_share_each_block_was_read_in():
    log = link(
        "ff", BlockMap.build(100, data=pairs((20, 4)), same=pairs((0, 20), (24, 40))), part=True, shares=["a", "b"]
    )
    one = link("a", BlockMap.build(100, data=pairs((0, 22))), part=True, share_of="ff", host="left")
    two = link("b", BlockMap.build(100, data=pairs((22, 42))), part=True, share_of="ff", host="right")
    assert labelled(shades_of_chain(Chain((log, one, two)))) == {
        "overwritten meanwhile: in the log": [(20, 4)],
        "read by right": [(24, 40)],
        "read by left": [(0, 20)],
    }


def test_of_a_long_chain_the_oldest_are_one():
    size = 1000
    whole = link("0", BlockMap.build(size, data=ExtentSet.whole(size)))
    links = [whole]
    for number in range(1, 20):
        mine = pairs((number * 10, 10))
        block_map = BlockMap.build(size, data=mine, same=mine.complement(size))
        links.insert(0, link(str(number), block_map, part=True, base=str(number - 1)))
    shades = shades_of_chain(Chain(tuple(links)))
    assert len(shades) == 1 + MOST_OTHERS
    assert shades[-1].label == "in 14 others"
    assert sum(shade.extents.total for shade in shades) == size
    assert len({shade.kind for shade in shades}) == len(shades)
    assert all(f".{shade.kind}" in drawing.svg(size, shades, "", "") for shade in shades)
