"""ext3 and ext4 that lost their power: what a journal that was not replayed will make of the bitmaps."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from conftest import Attach, Mount
from used_ext4_support import (
    MIB,
    assert_as_dumpe2fs,
    churn,
    lose_power,
    make_image,
    reason_declined,
    restore_used,
    run,
    tree_state,
    used,
    used_says_dumpe2fs,
)

CRASHING = {
    "ext4": ("-t ext4 -b 4096 -g 1024", ""),
    "ext3": ("-t ext3 -b 1024", ""),
    "1 KiB blocks": ("-t ext4 -b 1024 -g 1024", ""),
    "a log that has wrapped": ("-t ext4 -b 1024 -J size=1", ""),
    "data in the journal": ("-t ext4 -b 4096 -g 1024 -J size=24", "data=journal"),
    "data in a log that has wrapped": ("-t ext3 -b 1024 -J size=1", "data=journal"),
    "bigalloc": ("-t ext4 -O bigalloc -C 16384 -g 256", ""),
    "uninit_bg": ("-t ext4 -O ^metadata_csum,uninit_bg -b 4096 -g 1024", ""),
    "meta_bg": ("-t ext4 -O meta_bg,^resize_inode -b 1024 -g 512", ""),
    "orphan_file": ("-t ext4 -O orphan_file -b 4096 -g 1024", ""),
    "no extents": ("-t ext4 -O ^extents,^64bit -b 1024", ""),
}


def crashed_image(path: Path, mount: Mount, options: str, mount_options: str) -> Path:
    """Make an image that lost its power while files were written, committed, and deleted while open."""
    image = make_image(path, options, 64 * MIB, None)
    place = mount(image, *filter(None, ["loop", mount_options]))
    churn(place, seed=5, rounds=150)
    run("sync", "-f", place)
    churn(place, seed=6, rounds=100)
    with open(place / "deleted while open", "wb") as orphan:
        orphan.write(os.urandom(3 * MIB))
        os.fsync(orphan.fileno())
        (place / "deleted while open").unlink()
        with open(place / "last", "wb") as last:
            last.write(os.urandom(200_000))
            os.fsync(last.fileno())
        churn(place, seed=8, rounds=20)
        crashed = lose_power(place, image)
    run("umount", place)
    assert "needs_recovery" in run("dumpe2fs", "-h", crashed)
    return crashed


def replayed_copy(image: Path) -> Path:
    """Return a copy with its journal replayed, and no more: e2fsck would free what was deleted while open, too."""
    copy = Path(shutil.copy(image, image.with_name("replayed")))
    run("debugfs", "-w", "-R", "journal_run", copy)
    return copy


def assert_recovers_alike(image: Path, extents: ExtentSet, where: Path, mount: Mount) -> None:
    """Assert that e2fsck, and the kernel, make the same of an image and of a restore of its used blocks."""
    restored = restore_used(image, extents, where / "restored")
    for_kernel = Path(shutil.copy(restored, where / "for the kernel"))
    whole = Path(shutil.copy(image, where / "whole"))
    for each in (whole, restored):
        run("e2fsck", "-fy", each, codes=(0, 1))
        run("e2fsck", "-fn", each)
    there = tree_state(mount(whole, "loop", "ro"))
    assert len(there) > 10
    assert tree_state(mount(restored, "loop", "ro")) == there
    recovered = mount(for_kernel, "loop")
    assert tree_state(recovered) == there
    run("umount", recovered)
    run("e2fsck", "-fn", for_kernel)


@pytest.mark.root
@pytest.mark.parametrize("kind", CRASHING)
def test_a_restore_after_a_crash_recovers_to_the_same_files(kind: str, tmp_path: Path, mount: Mount) -> None:
    for _ in range(5):
        image = crashed_image(tmp_path / "image", mount, *CRASHING[kind])
        before, after = used_says_dumpe2fs(image), used_says_dumpe2fs(replayed_copy(image))
        # If another process called sync(2) at the wrong moment, the journal holds nothing that matters.
        if after.difference(before):
            break
    assert after.difference(before), "this test shows nothing"
    extents = used(image)
    assert not after.difference(extents)
    assert not before.difference(extents)
    assert extents.difference(before.union(after)).total <= 16 * 4096
    assert_recovers_alike(image, extents, tmp_path, mount)


@pytest.mark.root
@pytest.mark.slow
def test_reflink_copies_of_an_image_in_use_recover_to_the_same_files(tmp_path: Path, mount: Mount) -> None:
    pool = tmp_path / "pool"
    with open(pool, "wb") as file:
        file.truncate(2048 * MIB)
    run("mkfs.xfs", "-q", "-m", "reflink=1", pool)
    vault = mount(pool, "loop")
    image = make_image(vault / "image", "-t ext4 -b 4096 -J size=4", 96 * MIB, None)
    place = mount(image, "loop", "commit=1")
    stop = threading.Event()

    def write() -> None:
        seed = 0
        while not stop.wait(0.01):
            churn(place, seed := seed + 1, rounds=30)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(6):
            stop.wait(0.7)
            copy = vault / f"copy {number}"
            run("cp", "--reflink=always", image, copy)
            assert "needs_recovery" in run("dumpe2fs", "-h", copy)
            (tmp_path / str(number)).mkdir()
            assert_recovers_alike(copy, used(copy), tmp_path / str(number), mount)
    finally:
        stop.set()
        writer.join()
        run("umount", place)


@pytest.mark.root
def test_an_external_journal_is_answered_for_only_when_replayed(tmp_path: Path, mount: Mount, attach: Attach) -> None:
    journal = attach(make_image(tmp_path / "journal", "-b 4096 -O journal_dev", 16 * MIB, None))
    assert "journal of another filesystem" in reason_declined(journal)
    image = make_image(tmp_path / "image", f"-t ext4 -b 4096 -J device={journal}", 64 * MIB, None)
    assert_as_dumpe2fs(used(image), image)
    place = mount(image, "loop")
    churn(place, seed=1)
    crashed = lose_power(place, image)
    run("umount", place)
    assert "another device" in reason_declined(crashed)
    run("e2fsck", "-fy", "-j", journal, crashed, codes=(0, 1))
    assert_as_dumpe2fs(used(crashed), crashed)


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "mount_options", "reason"),
    [
        ("-t ext4 -O fast_commit", "", "fast commits"),
        ("-t ext4 -O ^has_journal", "", "not unmounted cleanly"),
        ("-t ext4 -O ^metadata_csum", "journal_checksum", "commits asynchronously"),
        ("-t ext4 -O ^metadata_csum", "journal_async_commit,data=writeback", "commits asynchronously"),
    ],
)
def test_what_a_crash_leaves_that_cannot_be_foretold_is_declined(
    options: str, mount_options: str, reason: str, tmp_path: Path, mount: Mount
) -> None:
    image = make_image(tmp_path / "image", f"{options} -b 4096", 32 * MIB, None)
    place = mount(image, *filter(None, ["loop", mount_options]))
    churn(place, seed=1)
    run("sync", "-f", place)
    crashed = lose_power(place, image)
    run("umount", place)
    assert reason in reason_declined(crashed)
