"""Disks with partition tables: real tables, real filesystems inside."""

from __future__ import annotations

import dataclasses
import os
import subprocess

import pytest

from blockferry.extents import ExtentSet
from blockferry.ladder import used_blocks
from blockferry.manager import plugin_manager
from blockferry.snapshot import Tier
from blockferry.used.partitions import read_table
from blockferry.volume import Volume
from volumes_support import copy_used, fingerprint, live_in, make_image, run

MIB = 1 << 20
GPT = """label: gpt
start=2048, size=131072
start=133120, size=196608
start=350000, size=20480
"""
MBR = """label: dos
start=2048, size=65536, type=83
start=67584, size=200000, type=5
start=69632, size=65536, type=83
start=137216, size=65536, type=83
"""


def partition(disk, table):
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=table, check=True, capture_output=True, text=True)
    return disk


def put(disk, image, offset):
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(image.read_bytes())


def filesystem(path, tool, mib):
    run(tool, "-q", make_image(path, mib * MIB))
    return path


def solid(path, mib):
    """Make an image of noise: no hole helps."""
    path.write_bytes(os.urandom(MIB) * mib)
    return path


@pytest.fixture
def disk(tmp_path):
    """A GPT disk: ext4 at 1 MiB, XFS at 65 MiB, a partition of noise, gaps."""
    disk = partition(solid(tmp_path / "disk.img", 200), GPT)
    put(disk, filesystem(tmp_path / "ext4.img", "mkfs.ext4", 64), MIB)
    put(disk, filesystem(tmp_path / "xfs.img", "mkfs.xfs", 96), 65 * MIB)
    return disk


def test_each_partition_is_asked_for_and_the_rest_is_whole(disk, tmp_path):
    manager, volume = plugin_manager(), Volume.discover(disk)
    used, tier, reason = used_blocks(manager, volume)
    assert (tier, used.method) == (Tier.USED, "partitions (ext4 bitmaps, xfs btrees)")
    assert reason == "partition 3: no plugin knows what is on it"
    expected = ExtentSet.from_pairs([(0, MIB), (161 * MIB, 39 * MIB)])
    for offset, mib in ((1, 64), (65, 96)):
        inner, _, _ = used_blocks(manager, volume.window(offset * MIB, mib * MIB))
        expected = expected.union(inner.extents.shift(offset * MIB))
    assert used.extents == expected
    assert used.extents.total < 80 * MIB


@pytest.mark.root
@pytest.mark.parametrize("freeze", [True, False])
def test_a_disk_comes_back_with_all_its_files(freeze, disk, tmp_path, attach, mount):
    device = attach(disk, "--partscan")
    run("partx", "--update", device)
    places = [mount(f"{device}p1"), mount(f"{device}p2")]
    for number, place in enumerate(places):
        live_in(place, number)
    contents = [fingerprint(place) for place in places]
    for place in places:
        run(*(("fsfreeze", "--freeze") if freeze else ("umount",)), place)
    try:
        for path in (disk, device):
            volume = Volume.discover(path)
            used, tier, _ = used_blocks(plugin_manager(), volume)
            assert (tier, used.method) == (
                Tier.USED,
                f"partitions ({'getfsmap' if freeze else 'ext4 bitmaps, xfs btrees'})",
            )
            assert used.extents.total < 0.7 * volume.size
        restored = copy_used(volume, used.extents, tmp_path / "restored.img")
    finally:
        for place in places if freeze else []:
            run("fsfreeze", "--unfreeze", place)
    for place in places if freeze else []:
        run("umount", place)
    again = attach(restored, "--partscan")
    run("partx", "--update", again)
    assert [fingerprint(mount(f"{again}p{number}")) for number in (1, 2)] == contents


def test_logical_partitions_are_read_and_their_chain_is_kept(tmp_path):
    disk = partition(solid(tmp_path / "disk.img", 140), MBR)
    put(disk, filesystem(tmp_path / "one.img", "mkfs.ext4", 32), 2048 * 512)
    put(disk, filesystem(tmp_path / "two.img", "mkfs.ext4", 32), 137216 * 512)
    volume = Volume.discover(disk)
    assert [each.number for each in read_table(volume)] == [1, 5, 6]
    used, tier, reason = used_blocks(plugin_manager(), volume)
    assert tier is Tier.USED
    assert reason == "partition 5: no plugin knows what is on it"
    # The extended partition's own sectors, between the partitions, chain the logical ones.
    assert used.extents.covers(67584 * 512, 69632 * 512)
    assert used.extents.covers(135168 * 512, 137216 * 512)
    assert not used.extents.covers(137216 * 512, (137216 + 65536) * 512)


def test_a_partition_of_which_nobody_knows_loses_only_its_holes(tmp_path):
    disk = partition(make_image(tmp_path / "disk.img", 200 * MIB), GPT)
    put(disk, filesystem(tmp_path / "ext4.img", "mkfs.ext4", 64), MIB)
    with disk.open("r+b") as file:
        file.seek(350000 * 512 + 5 * MIB)
        file.write(os.urandom(MIB))
    used, tier, _ = used_blocks(plugin_manager(), Volume.discover(disk))
    assert tier is Tier.USED
    assert used.extents.covers(350000 * 512 + 5 * MIB, 350000 * 512 + 6 * MIB)
    assert not used.extents.clip(350000 * 512 + 7 * MIB, 350000 * 512 + 10 * MIB)
    assert used.extents.covers(0, 34 * 512)
    assert used.extents.covers(200 * MIB - 512, 200 * MIB)


@pytest.mark.parametrize("name", ["disk7", "disk-part2", "disk"])
def test_a_table_is_read_through_a_descriptor_and_whatever_the_name(name, disk, tmp_path):
    named = disk.rename(tmp_path / name)
    volume = Volume.discover(named)
    with named.open("rb") as file:
        unnamed = dataclasses.replace(volume, path=f"/proc/self/fd/{file.fileno()}")
        assert read_table(unnamed) == read_table(volume)
        assert [each.number for each in read_table(volume)] == [1, 2, 3]
        assert used_blocks(plugin_manager(), unnamed) == used_blocks(plugin_manager(), volume)


def test_a_table_over_nothing_known_is_a_whole_disk(tmp_path):
    disk = partition(solid(tmp_path / "disk.img", 200), GPT)
    used, tier, reason = used_blocks(plugin_manager(), Volume.discover(disk))
    assert (used.extents, tier) == (ExtentSet.whole(200 * MIB), Tier.WHOLE)
    assert reason.startswith("partition 1: ")


def mbr(disk, *entries):
    """Write a table as no tool would: entries of type, first sector, sectors."""
    sector = bytearray(512)
    sector[0x1B8:0x1BC] = b"disk"
    for number, (kind, start, size) in enumerate(entries):
        at = 446 + 16 * number
        sector[at + 4] = kind
        sector[at + 8 : at + 12], sector[at + 12 : at + 16] = start.to_bytes(4, "little"), size.to_bytes(4, "little")
    sector[510:] = b"\x55\xaa"
    with disk.open("r+b") as file:
        file.write(sector)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([(0x83, 2048, 65536), (0x83, 40000, 65536)], "partition 2 overlaps"),
        ([(0x83, 2048, 65536), (0x83, 100000, 1 << 24)], "ends behind the end"),
        ([(0x83, 0, 65536)], "partition table: "),
    ],
)
def test_a_table_that_is_not_sound_is_declined(entries, words, tmp_path):
    disk = solid(tmp_path / "disk.img", 64)
    put(disk, filesystem(tmp_path / "ext4.img", "mkfs.ext4", 32), MIB)
    mbr(disk, *entries)
    used, tier, reason = used_blocks(plugin_manager(), Volume.discover(disk))
    assert (used.extents, tier) == (ExtentSet.whole(64 * MIB), Tier.WHOLE)
    assert words in reason


def test_an_extended_partition_that_leads_in_circles_ends(tmp_path):
    disk = make_image(tmp_path / "disk.img", 64 * MIB)
    mbr(disk, (5, 2048, 65536))
    ring = bytearray(512)
    ring[446 + 4], ring[446 + 16 + 4] = 0x83, 5
    ring[446 + 8 : 446 + 16] = (2048).to_bytes(4, "little") + (1024).to_bytes(4, "little")
    ring[446 + 24 : 446 + 32] = (0).to_bytes(4, "little") + (65536).to_bytes(4, "little")
    ring[510:] = b"\x55\xaa"
    with disk.open("r+b") as file:
        file.seek(2048 * 512)
        file.write(ring)
    used, tier, _ = used_blocks(plugin_manager(), Volume.discover(disk))
    assert tier is Tier.WHOLE
    assert used.extents.covers(0, 512)


def test_a_table_inside_a_partition_is_not_read(disk, tmp_path):
    outer = solid(tmp_path / "outer.img", 210)
    put(outer, disk, 5 * MIB)
    _, tier, reason = used_blocks(plugin_manager(), Volume.discover(outer).window(5 * MIB, 200 * MIB))
    assert tier is Tier.WHOLE
    assert "inside a partition" in reason
