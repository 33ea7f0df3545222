"""Offline XFS: real filesystems that were mounted, lived in, frozen, cut off and damaged."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockferry.extents import ExtentSet
from blockferry.used.xfs import reader as xfs
from blockferry.volume import Volume
from volumes_support import ask, copy_used, fingerprint, live_in, make_image, run

MIB = 1 << 20
pytestmark = pytest.mark.root

VARIANTS = {
    "default": (96, ""),
    "1 KiB blocks": (96, "-b size=1024"),
    "64 KiB blocks": (520, "-b size=65536"),
    "16 KiB blocks, 64 KiB directories": (320, "-b size=16384 -n size=65536"),
    "4 KiB sectors": (96, "-s size=4096"),
    "32 KiB sectors": (400, "-b size=32768 -s size=32768"),
    "many groups": (300, "-d agcount=16 -b size=1024"),
    "one group": (96, "-d agcount=1"),
    "every btree": (300, "-m rmapbt=1,reflink=1,finobt=1,inobtcount=1,bigtime=1 -i nrext64=1,sparse=1"),
    "no extra btree": (96, "-m rmapbt=0,reflink=0,finobt=0,inobtcount=0,bigtime=0 -i nrext64=0,sparse=0"),
    "striped log": (300, "-l su=256k"),
    "striped data": (300, "-d su=64k,sw=4 -b size=1024"),
    "large inodes": (96, "-i size=2048"),
    "parent pointers, exchange of ranges": (320, "-n parent=1 -i exchange=1 -m rmapbt=1"),
    "metadata directory": (320, "-m metadir=1"),
}
NEEDS_XFSPROGS_6_13 = ("parent pointers, exchange of ranges", "metadata directory")


def make(path: Path, mib: int, options: str) -> Path:
    run("mkfs.xfs", "-q", *options.split(), make_image(path, mib * MIB))
    return path


def mkfs_usage() -> str:
    return subprocess.run(["mkfs.xfs", "-?"], check=False, capture_output=True, text=True).stderr


def expected_free(image: Path) -> tuple[ExtentSet, int]:
    """Return what xfs_db counts as free, AGFL included, and how much of it can be AGFL."""
    geometry = dict(line.split(" = ") for line in run("xfs_db", "-r", "-c", "sb 0", "-c", "p", image).splitlines())
    block, group = int(geometry["blocksize"]), int(geometry["agblocks"])
    pairs = []
    for line in run("xfs_db", "-r", "-c", "freesp -d", image).splitlines()[1:]:
        words = line.split()
        if len(words) != 3 or not words[0].isdigit():
            break
        number, start, length = map(int, words)
        pairs.append(((number * group + start) * block, length * block))
    return ExtentSet.from_pairs(pairs), int(geometry["agcount"]) * 16 * block


def check_against_xfs_db(image: Path, used: ExtentSet) -> None:
    size = image.stat().st_size
    free, freelist = expected_free(image)
    assert free
    mine = used.complement(size)
    assert not mine.difference(free), "counts as free what xfs_db does not"
    assert free.difference(mine).total <= freelist
    assert used.total <= free.complement(size).total * 1.01 + freelist


def check_repair_is_content(image: Path) -> None:
    run("xfs_repair", "-n", "-o", "force_geometry", image)


def answer(image: Path) -> ExtentSet:
    used, reasons = ask(xfs, Volume.discover(image))
    assert used is not None, reasons
    assert (used.method, reasons) == ("xfs btrees", [])
    return used.extents


def declined(image: Path) -> str:
    used, reasons = ask(xfs, Volume.discover(image))
    assert used is None
    (reason,) = reasons
    assert reason.startswith("xfs: ")
    return reason


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_used_blocks_of_an_unmounted_filesystem_are_all_that_it_needs(variant, tmp_path, mount):
    if variant in NEEDS_XFSPROGS_6_13 and "parent=" not in mkfs_usage():
        pytest.skip("this mkfs.xfs does not know it yet: install xfsprogs 6.13 or later")
    image = make(tmp_path / "disk.img", *VARIANTS[variant])
    place = mount(image)
    live_in(place, 1)
    live_in(place, 2, files=200)
    content = fingerprint(place)
    run("umount", place)
    used = answer(image)
    check_against_xfs_db(image, used)
    restored = copy_used(Volume.discover(image), used, tmp_path / "restored.img")
    check_repair_is_content(restored)
    assert fingerprint(mount(restored, "nouuid")) == content


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("log", ["-l version=2", "-l version=1", "-l version=2,su=32k"])
def test_version_4_is_read_without_checksums(block_size, log, tmp_path):
    """The kernel may not mount version 4 any more, so mkfs itself fills it: files on a stripe leave gaps."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * 66_000)
    files = "\n".join(f"f{number} ---644 0 0 {source}" for number in range(200))
    prototype = tmp_path / "prototype"
    prototype.write_text(f"/dev/null\n0 0\nd--755 0 0\n{files}\n$\n")
    options = f"-m crc=0 -b size={block_size} -d su=64k,sw=1 {log} -p {prototype}"
    image = make(tmp_path / "disk.img", 96, options)
    used = answer(image)
    check_against_xfs_db(image, used)
    assert len(used) > 100
    restored = copy_used(Volume.discover(image), used, tmp_path / "restored.img")
    check_repair_is_content(restored)


def test_trees_of_several_levels_are_walked(tmp_path, mount):
    image = make(tmp_path / "disk.img", 128, "-b size=1024 -d agcount=2")
    place = mount(image)
    for number in range(9000):
        (place / f"f{number:05}").write_bytes(b"x" * 1500)
    os.sync()
    for number in range(0, 9000, 2):
        (place / f"f{number:05}").unlink()
    content = fingerprint(place)
    run("umount", place)
    levels = run("xfs_db", "-r", "-c", "agf 0", "-c", "p bnolevel", "-c", "agf 1", "-c", "p bnolevel", image)
    assert "bnolevel = 2" in levels
    used = answer(image)
    check_against_xfs_db(image, used)
    assert len(used) > 1000
    restored = copy_used(Volume.discover(image), used, tmp_path / "restored.img")
    check_repair_is_content(restored)
    assert fingerprint(mount(restored)) == content


def test_a_filesystem_that_is_full_is_all_in_use_but_for_crumbs(tmp_path, mount):
    image = make(tmp_path / "disk.img", 64, "-d agcount=2")
    place = mount(image)
    with pytest.raises(OSError, match="No space left"), (place / "big").open("wb", buffering=0) as big:
        while big.write(bytes(MIB)):
            pass
    run("umount", place)
    used = answer(image)
    check_against_xfs_db(image, used)
    assert used.total > 59 * MIB


def test_what_lies_behind_the_end_of_the_filesystem_is_in_use(tmp_path):
    image = make(tmp_path / "disk.img", 96, "-d size=90m")
    assert answer(image).covers(90 * MIB, 96 * MIB)


def test_a_grown_filesystem_is_read(tmp_path, mount):
    image = make(tmp_path / "disk.img", 200, "-d size=96m")
    place = mount(image)
    live_in(place, 3)
    run("xfs_growfs", place)
    live_in(place, 4)
    run("umount", place)
    check_against_xfs_db(image, answer(image))


def test_a_window_of_a_disk_is_read(tmp_path, mount):
    image = make(tmp_path / "disk.img", 96, "")
    place = mount(image)
    live_in(place, 5)
    run("umount", place)
    disk = make_image(tmp_path / "disk", 100 * MIB)
    with disk.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(image.read_bytes())
    used, _ = ask(xfs, Volume.discover(disk).window(2 * MIB, 96 * MIB))
    assert used is not None
    assert used.extents == answer(image)


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "-b size=1024", "-l su=256k", "-s size=4096", "-m rmapbt=1"])
def test_a_copy_of_a_frozen_filesystem_is_answered_for_and_mounts(options, tmp_path, mount):
    image = make(tmp_path / "disk.img", 300, options)
    place = mount(image)
    live_in(place, 6)
    # A file that is unlinked and still open keeps its blocks until the copy's first mount.
    with (place / "open").open("w+b") as unlinked:
        unlinked.write(b"x" * MIB)
        (place / "open").unlink()
        content = fingerprint(place)
        run("xfs_freeze", "-f", place)
        try:
            copy = shutil.copyfile(image, tmp_path / "copy.img")
        finally:
            run("xfs_freeze", "-u", place)
    run("umount", place)
    assert b"unmount" not in subprocess.run(["xfs_logprint", "-t", copy], check=False, capture_output=True).stdout
    used = answer(copy)
    check_against_xfs_db(copy, used)
    restored = copy_used(Volume.discover(copy), used, tmp_path / "restored.img")
    again = mount(restored)
    assert fingerprint(again) == content
    run("umount", again)
    check_repair_is_content(restored)


def test_a_dirty_log_is_declined(tmp_path, mount):
    image = make(tmp_path / "disk.img", 96, "")
    place = mount(image)
    live_in(place, 7)
    run("sync", "-f", place)
    copy = shutil.copyfile(image, tmp_path / "copy.img")
    run("umount", place)
    assert "needs recovery" in declined(copy)


def test_any_moment_at_which_the_power_fails_is_declined_or_answered_for_rightly(tmp_path, mount):
    """The image's file is what the disk holds at that moment: nothing of the filesystem waits in between."""
    image = make(tmp_path / "disk.img", 96, "-b size=1024")
    place = mount(image)
    answered = 0
    for moment in range(12):
        live_in(place, moment, files=60)
        if moment % 2:
            run("sync", "-f", place)
        if moment % 3 == 2:
            run("xfs_freeze", "-f", place)
            run("xfs_freeze", "-u", place)
        if moment % 4 == 3:
            (place / "after").write_bytes(b"x" * moment * 1000)
            run("sync", "-f", place / "after")
        copy = shutil.copyfile(image, tmp_path / "copy.img")
        used, reasons = ask(xfs, Volume.discover(copy))
        assert (used is None) == bool(reasons)
        if used is not None:
            answered += 1
            restored = copy_used(Volume.discover(copy), used.extents, tmp_path / "restored.img")
            assert content_after_recovery(mount, restored) == content_after_recovery(mount, copy)
            check_repair_is_content(restored)
    assert answered


def content_after_recovery(mount: Callable[..., Path], image: Path) -> dict[str, str]:
    """Mount once, which replays the log, and return what is there."""
    place = mount(image, "nouuid")
    content = fingerprint(place)
    run("umount", place)
    return content


def log_head(device: str) -> tuple[int, int]:
    """Return cycle and block of a mounted filesystem's log head."""
    cycle, block = (Path("/sys/fs/xfs") / Path(device).name / "log/log_head_lsn").read_text().split(":")
    return int(cycle), int(block)


def log_size(image: Path) -> int:
    """Return how many blocks of 512 bytes the log has."""
    words = run("xfs_db", "-r", "-c", "sb 0", "-c", "p logblocks blocksize", image).split()
    return int(words[2]) * int(words[5]) // 512


def move_log(place: Path, device: str, size: int, cycle: int, block: int) -> None:
    """Log attributes, nine blocks each or some more, until the log's head has come to a place, or a little beyond."""
    files = [place / f"r{number}" for number in range(100)]
    for file in files:
        file.touch()
    while log_head(device) < (cycle, block):
        blocks_left = (cycle - log_head(device)[0]) * size + block - log_head(device)[1]
        for file in files[: max(1, min(100, blocks_left // 30))]:
            os.setxattr(file, "user.x", random.randbytes(2000))
        run("sync", "-f", place)


@pytest.mark.parametrize("options", ["-l size=4096b", "-l size=5120b,su=128k", "-l size=4096b,su=4k -b size=1024"])
@pytest.mark.parametrize("ending", ["unmounted", "frozen"])
def test_a_log_that_has_gone_round_is_read(options, ending, tmp_path, attach, mount):
    image = make(tmp_path / "disk.img", 96, options)
    device = attach(image)
    place = mount(device)
    move_log(place, device, log_size(image), 3, 100)
    if ending == "unmounted":
        run("umount", place)
        check_against_xfs_db(image, answer(image))
        return
    run("xfs_freeze", "-f", place)
    copy = shutil.copyfile(image, tmp_path / "copy.img")
    run("xfs_freeze", "-u", place)
    check_against_xfs_db(copy, answer(copy))


@pytest.mark.thorough
def test_a_log_whose_last_record_reaches_around_its_end_is_read(tmp_path, attach, mount):
    """Every freeze moves the head by a few blocks: here it steps over the end of the log."""
    image = make(tmp_path / "disk.img", 96, "-l size=4096b")
    device = attach(image)
    place = mount(device)
    blocks = log_size(image)
    move_log(place, device, blocks, 1, blocks - 60)
    heads = []
    while log_head(device) < (2, 12):
        run("xfs_freeze", "-f", place)
        copy = shutil.copyfile(image, tmp_path / "copy.img")
        run("xfs_freeze", "-u", place)
        heads.append(log_head(device))
        check_against_xfs_db(copy, answer(copy))
    assert heads[0] >= (1, blocks - 60)
    assert {cycle for cycle, _ in heads} == {1, 2}


def test_an_external_log_cannot_be_seen(tmp_path, attach):
    log = attach(make_image(tmp_path / "log.img", 64 * MIB))
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run("mkfs.xfs", "-q", "-l", f"logdev={log}", image)
    assert "log is on another device" in declined(image)


def test_a_filesystem_that_is_mounted_for_writing_is_left_to_the_kernel(tmp_path, mount):
    image = make(tmp_path / "disk.img", 96, "")
    mount(image)
    assert "mounted for writing" in declined(image)


def test_a_filesystem_that_is_mounted_for_reading_is_answered_for(tmp_path, mount):
    image = make(tmp_path / "disk.img", 96, "")
    mount(image, "ro")
    check_against_xfs_db(image, answer(image))


# -- what is not for this reader ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "bits", "words"),
    [
        ("features_incompat", 0x8000, "incompat 0x8000"),
        ("features_ro_compat", 0x4000, "ro_compat 0x4000"),
        ("features_log_incompat", 0x2, "log_incompat 0x2"),
        ("features_compat", 0x1, "compat 0x1"),
        ("features_incompat", 0x10, "xfs_repair"),
        ("rblocks", 100, "realtime"),
        ("rextents", 1, "realtime"),
        ("inprogress", 1, "mkfs"),
    ],
)
def test_unknown_features_are_declined(field, bits, words, tmp_path):
    image = make(tmp_path / "disk.img", 96, "")
    plain = run("xfs_db", "-r", "-c", "sb 0", "-c", f"p {field}", image).split()[-1]
    run("xfs_db", "-x", "-c", "sb 0", "-c", f"write -d {field} {int(plain, 0) | bits:#x}", image)
    assert words in declined(image)


def test_a_new_uuid_is_told_from_that_of_the_metadata(tmp_path, mount):
    image = make(tmp_path / "disk.img", 96, "")
    place = mount(image)
    live_in(place, 8)
    run("umount", place)
    run("xfs_admin", "-U", "generate", image)
    assert "no mount followed" in declined(image)
    run("umount", mount(image))
    assert "META_UUID" in run("xfs_db", "-r", "-c", "version", image)
    check_against_xfs_db(image, answer(image))


def test_other_filesystems_are_not_for_this_reader(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    run("mkfs.ext4", "-q", image)
    assert ask(xfs, Volume.discover(image)) == (None, [])


def test_a_volume_that_was_cut_short_is_declined(tmp_path):
    image = make(tmp_path / "disk.img", 96, "")
    os.truncate(image, 80 * MIB)
    assert "larger" in declined(image)


# -- damage ------------------------------------------------------------------------------------------------------------


def metadata_places(image: Path) -> list[tuple[int, int]]:
    """Return start and size of what the reader reads: superblock, AGFs, every btree block, the log around its head."""
    read: list[tuple[int, int]] = []
    volume = Volume.discover(image)
    with volume.open() as layer:
        plain = layer.read_into

        def remember(offset: int, buffer: memoryview) -> None:
            read.append((offset, len(buffer)))
            plain(offset, buffer)

        layer.read_into = remember
        xfs._free_extents(layer)
    return [(start, min(size, 4096)) for start, size in read if size]


@pytest.mark.parametrize("version", [4, 5])
def test_damage_is_declined_or_changes_nothing(version, tmp_path, mount):
    if version == 5:
        image = make(tmp_path / "disk.img", 96, "-b size=1024")
        place = mount(image)
        live_in(place, 9)
        run("umount", place)
    else:
        source = tmp_path / "source"
        source.write_bytes(b"x" * 66_000)
        (tmp_path / "prototype").write_text(
            "/dev/null\n0 0\nd--755 0 0\n" + "".join(f"f{n} ---644 0 0 {source}\n" for n in range(200)) + "$\n"
        )
        image = make(tmp_path / "disk.img", 96, f"-m crc=0 -b size=512 -d su=64k,sw=1 -p {tmp_path / 'prototype'}")
    free = answer(image).complement(image.stat().st_size)
    places = metadata_places(image)
    volume = Volume.discover(image)
    chance = random.Random(version)
    refused = 0
    with image.open("r+b", buffering=0) as file:
        for _ in range(250):
            start, size = chance.choice(places)
            changes = [
                (start + chance.randrange(size), chance.randrange(1, 256)) for _ in range(chance.choice([1, 1, 4]))
            ]
            before = [os.pread(file.fileno(), 1, offset) for offset, _ in changes]
            for (offset, mask), byte in zip(changes, before, strict=True):
                os.pwrite(file.fileno(), bytes([byte[0] ^ mask]), offset)
            used, reasons = ask(xfs, volume)
            assert (used is None) == bool(reasons)
            if used is not None:
                assert not used.extents.complement(volume.size).difference(free), changes
            refused += used is None
            for (offset, _), byte in zip(reversed(changes), reversed(before), strict=True):
                os.pwrite(file.fileno(), byte, offset)
    assert refused > 30
    assert answer(image).complement(volume.size) == free


def test_trees_that_point_at_themselves_end(tmp_path):
    """Version 4 has no checksum to stop a walk: here every pointer of a root leads back to it, or twice to one leaf."""
    image = make(tmp_path / "disk.img", 64, "-m crc=0 -b size=512 -d agcount=1")
    raw = bytearray(image.read_bytes())
    agf = 512
    root = int.from_bytes(raw[agf + 16 : agf + 20], "big") * 512
    for levels in (2, 9):
        raw[agf + 28 : agf + 32] = levels.to_bytes(4, "big")
        node = np.zeros(512, np.uint8)
        node[:4] = np.frombuffer(b"ABTB", np.uint8)
        node[4:8] = [0, levels - 1, 0, 41]
        node[8:16] = 255
        pointers = (512 - 16) // 12 * 8 + 16
        node[pointers : pointers + 4 * 41].view(">u4")[:] = root // 512
        raw[root : root + 512] = node.tobytes()
        image.write_bytes(raw)
        began = time.monotonic()
        assert "damaged" in declined(image)
        assert time.monotonic() - began < 2


@pytest.mark.slow
def test_a_terabyte_is_read_in_a_blink(tmp_path, mount):
    image = make(tmp_path / "disk.img", 1 << 20, "")
    place = mount(image)
    for number in range(5000):
        (place / f"f{number}").write_bytes(b"x" * (number % 9000))
    run("umount", place)
    volume = Volume.discover(image)
    ask(xfs, volume)
    began = time.monotonic()
    used, _ = ask(xfs, volume)
    assert used is not None
    assert time.monotonic() - began < 0.5  # measured: 0.012 s
