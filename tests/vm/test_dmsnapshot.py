"""What changed on thick logical volumes, by the snapshots kept since."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.changed import dmsnapshot, era, thin
from blockferry.volume import Volume
from conftest import Attach, Mount
from devicemapper_support import back_up, begin, changed, check, contents, declines, declines_to_begin, differing, run
from volumes_support import live_in
from volumes_support import run as run_small

pytestmark = pytest.mark.root

GROUP = "blockferry-test"
MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A volume group of 160 MiB; its device."""
    image = tmp_path_factory.mktemp("disk") / "disk.img"
    image.touch()
    os.truncate(image, 164 * MIB)
    device = run("losetup", "--find", "--show", str(image)).strip()
    run("vgcreate", GROUP, device)
    yield device
    run("vgremove", "--yes", "--force", GROUP)
    run("losetup", "--detach", device)


@pytest.fixture
def volume(disk: str) -> Iterator[str]:
    """A logical volume of 32 MiB."""
    run("lvcreate", "--yes", "--size", "32M", "--name", "data", GROUP)
    yield f"/dev/{GROUP}/data"
    run("lvremove", "--yes", "--force", GROUP)
    assert disk


def snapshots() -> list[str]:
    return run("lvs", "--noheadings", "--options", "lv_name", "--select", "lv_tags=blockferry-checkpoint").split()


def reactivate() -> None:
    run("vgchange", "--activate", "n", GROUP)
    run("vgchange", "--activate", "y", GROUP)


def write(device: str, offset: int, data: bytes) -> None:
    with open(device, "r+b") as disk:
        disk.seek(offset)
        disk.write(data)
        disk.flush()
        os.fsync(disk.fileno())


def test_every_write_to_a_mounted_filesystem_is_in_the_answer(volume: str, mount: Mount) -> None:
    run("mkfs.ext4", "-q", volume)
    first, image_1 = begin(dmsnapshot, volume, "000000000001"), contents(volume)
    live_in(mount(volume), 2, files=40)
    second, image_2, (since_1,) = back_up(dmsnapshot, volume, "000000000002", [first])
    check(since_1, image_1, image_2)
    assert sorted(snapshots()) == ["blockferry-000000000001", "blockferry-000000000002"]
    live_in(mount(volume), 3, files=40)
    os.sync()
    image_3 = contents(volume)
    check(changed(dmsnapshot, volume, first), image_1, image_3)
    check(changed(dmsnapshot, volume, second), image_2, image_3)
    dmsnapshot.blockferry_release_checkpoint(first)
    dmsnapshot.blockferry_release_checkpoint(first)
    assert snapshots() == ["blockferry-000000000002"]
    assert "gone" in declines(dmsnapshot, volume, first)


@pytest.mark.thorough
def test_every_write_to_a_mounted_xfs_is_in_the_answer(volume: str, mount: Mount) -> None:
    run_small("mkfs.xfs", "-q", volume)
    since, before = begin(dmsnapshot, volume), contents(volume)
    live_in(mount(volume), 1, files=40)
    os.sync()
    check(changed(dmsnapshot, volume, since), before, contents(volume))


@pytest.mark.thorough
def test_scattered_writes_fill_many_areas_of_the_table_and_outlast_the_volume_s_deactivation(volume: str) -> None:
    since = begin(dmsnapshot, volume)
    before = contents(volume)
    chance = random.Random(4)
    assert not changed(dmsnapshot, volume, since)
    for count in (300, 60):  # 256 fit into an area
        with open(volume, "r+b") as disk:
            for place in chance.sample(range(32 * 256), count):
                os.pwrite(disk.fileno(), chance.randbytes(chance.choice((1, 512, 4096, 5000))), place * 4096)
        check(changed(dmsnapshot, volume, since), before, contents(volume))
        reactivate()
    answer, truth = changed(dmsnapshot, volume, since), differing(before, contents(volume)).align(4096, 32 * MIB)
    assert truth.total <= answer.total <= 1.01 * truth.total  # a byte or two were zero before
    run("blkdiscard", "--zeroout", "--offset", "0", "--length", "3M", volume)
    assert changed(dmsnapshot, volume, since).covers(0, 3 * MIB)


@pytest.mark.thorough
def test_a_snapshot_that_overflowed_is_no_answer(volume: str) -> None:
    run("lvcreate", "--yes", "--size", "88M", "--name", "filler", GROUP)  # leaves 40 MiB, of which it gets half
    since = begin(dmsnapshot, volume)
    write(volume, 0, os.urandom(8 * MIB))
    assert changed(dmsnapshot, volume, since).total == 8 * MIB
    write(volume, 8 * MIB, os.urandom(5 * MIB))
    assert "as good as full" in declines(dmsnapshot, volume, since)
    write(volume, 16 * MIB, os.urandom(10 * MIB))
    assert "void" in declines(dmsnapshot, volume, since)
    reactivate()
    assert "void" in declines(dmsnapshot, volume, since)
    dmsnapshot.blockferry_release_checkpoint(since)
    assert snapshots() == []


@pytest.mark.thorough
def test_only_the_very_snapshot_of_the_very_volume_answers(volume: str) -> None:
    since = begin(dmsnapshot, volume)
    run("lvcreate", "--yes", "--size", "32M", "--name", "other", GROUP)
    assert "another logical volume" in declines(dmsnapshot, f"/dev/{GROUP}/other", since)
    others = begin(dmsnapshot, f"/dev/{GROUP}/other", "aaaaaaaaaaaa")
    swapped = others.state | {"origin_uuid": since.state["origin_uuid"]}
    assert "not a snapshot of" in declines(dmsnapshot, volume, dataclasses.replace(since, state=swapped))
    damaged = dataclasses.replace(since, state=since.state | {"snapshot_uuid": '" || lv_name="data'})
    assert "names no logical volume" in declines(dmsnapshot, volume, damaged)
    dmsnapshot.blockferry_release_checkpoint(damaged)
    assert len(snapshots()) == 2
    name = f"{GROUP}/blockferry-0123456789ab"
    run("lvremove", "--yes", name)
    run("lvcreate", "--snapshot", "--size", "16M", "--name", name, "--addtag", "blockferry-checkpoint", volume)
    assert "gone" in declines(dmsnapshot, volume, since)
    dmsnapshot.blockferry_release_checkpoint(since)
    assert len(snapshots()) == 2  # another's of the same name is left alone


@pytest.mark.thorough
def test_a_group_without_room_declines_and_other_volumes_are_not_its_business(volume: str, attach: Attach) -> None:
    run("lvcreate", "--yes", "--size", "104M", "--name", "filler", GROUP)  # leaves 24 MiB
    (reason,) = declines_to_begin(dmsnapshot, volume)
    assert f"the group {GROUP} has too few free extents" in reason
    run("lvremove", "--yes", f"{GROUP}/filler")
    assert declines_to_begin(thin, volume) == declines_to_begin(era, volume) == []
    image = Path("/dev/shm/not-lvm.img")
    image.write_bytes(bytes(MIB))
    for path in (str(image), attach(image)):
        assert (
            declines_to_begin(dmsnapshot, path) == declines_to_begin(thin, path) == declines_to_begin(era, path) == []
        )
    window = Volume.discover(volume).window(MIB, MIB)
    assert dmsnapshot.blockferry_checkpoint(window, "0123456789ab", dmsnapshot.TRACKER, pytest.fail) is None
    image.unlink()


# -- a power cut -------------------------------------------------------------------------------------------------------


def replay(log: Path, mark: bytes, disk: Path) -> None:
    """Write to a disk what dm-log-writes recorded up to a mark: what had been flushed by then, and nothing else.

    The format is that of the kernel's drivers/md/dm-log-writes.c.
    """
    with log.open("rb") as source, disk.open("r+b") as target:
        magic, _, entries, sector = struct.unpack("<QQQI", source.read(28))
        assert magic == 0x6A736677736872
        position = sector
        for _ in range(entries):
            source.seek(position)
            start, count, flags, length = struct.unpack("<QQQQ", source.read(32))
            position += sector
            if flags & 8:  # a mark: its text follows in the same sector
                if source.read(length) == mark:
                    return
            elif flags & 4:  # a discard
                os.pwrite(target.fileno(), bytes(count * sector), start * sector)
            else:
                source.seek(position)
                os.pwrite(target.fileno(), source.read(count * sector), start * sector)
                position += count * sector
    pytest.fail("the mark is not in the log")


@pytest.mark.thorough
def test_what_was_synced_before_a_power_cut_is_in_the_answer_after_it(tmp_path: Path, attach: Attach) -> None:
    disk, log = tmp_path / "disk.img", tmp_path / "log.img"
    for image, size in ((disk, 100), (log, 200), (tmp_path / "after.img", 100)):
        image.touch()
        os.truncate(image, size * MIB)
    sectors = 100 * MIB // 512
    run("dmsetup", "create", "recorded", "--table", f"0 {sectors} log-writes {attach(disk)} {attach(log)}")
    # LVM would see the same label on the recorded device and below it: it begins 1 MiB further on.
    run("dmsetup", "create", "disk", "--table", f"0 {sectors - 2048} linear /dev/mapper/recorded 2048")
    run("vgcreate", "blockferry-cut", "/dev/mapper/disk")
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "32M", "--name", "data", "blockferry-cut")
    volume, place = "/dev/blockferry-cut/data", tmp_path / "place"
    run("mkfs.ext4", "-q", volume)
    place.mkdir()
    run("mount", volume, str(place))
    live_in(place, 1, files=40)
    since, before, _ = back_up(dmsnapshot, volume, "0123456789ab", [])
    with (place / "synced").open("wb") as file:
        file.write(random.Random(5).randbytes(3 * MIB))
        os.fsync(file.fileno())
    run("dmsetup", "message", "recorded", "0", "mark", "cut")
    live_in(place, 2, files=40)
    run("umount", str(place))
    run("vgchange", "--activate", "n", "blockferry-cut")
    run("dmsetup", "remove", "disk")
    run("dmsetup", "remove", "recorded")

    replay(log, b"cut", tmp_path / "after.img")
    attach(tmp_path / "after.img", "--offset", str(MIB))
    run("vgchange", "--activate", "y", "blockferry-cut")
    run("mount", volume, str(place))
    assert (place / "synced").read_bytes() == random.Random(5).randbytes(3 * MIB)
    run("umount", str(place))
    check(changed(dmsnapshot, volume, since), before, contents(volume))
    run("vgremove", "--yes", "--force", "blockferry-cut")
