"""What changed on thin logical volumes, by comparing mappings."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.changed import dmsnapshot, thin
from conftest import Mount
from devicemapper_support import back_up, begin, changed, check, contents, declines, declines_to_begin, differing, run
from volumes_support import live_in
from volumes_support import run as run_small

pytestmark = pytest.mark.root

GROUP = "blockferry-test"
POOL = "blockferry--test-pool-tpool"
MIB = 1 << 20
BLOCK = 64 * 1024


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A thin pool of 120 MiB."""
    image = tmp_path_factory.mktemp("disk") / "disk.img"
    image.touch()
    os.truncate(image, 164 * MIB)
    device = run("losetup", "--find", "--show", str(image)).strip()
    run("vgcreate", GROUP, device)
    run("lvcreate", "--yes", "--size", "120M", "--chunksize", "64k", "--thin", f"{GROUP}/pool")
    yield f"{GROUP}/pool"
    run("vgremove", "--yes", "--force", GROUP)
    run("losetup", "--detach", device)


@pytest.fixture
def volume(pool: str) -> Iterator[str]:
    """A thin volume of 32 MiB."""
    run("lvcreate", "--yes", "--virtualsize", "32M", "--thin", "--name", "data", pool)
    yield f"/dev/{GROUP}/data"
    run("lvremove", "--yes", "--force", f"{GROUP}/data")
    kept = [f"{GROUP}/{name}" for name in snapshots()]
    if kept:
        run("lvremove", "--yes", "--force", *kept)


def snapshots() -> list[str]:
    return run("lvs", "--noheadings", "--options", "lv_name", "--select", "lv_tags=blockferry-checkpoint").split()


@pytest.mark.thorough
def test_every_write_to_a_mounted_filesystem_is_in_the_answer(volume: str, mount: Mount) -> None:
    run("mkfs.ext4", "-q", volume)
    first, image_1 = begin(thin, volume, "000000000001"), contents(volume)
    place = mount(volume, "discard")
    live_in(place, 2, files=40)
    run("fstrim", str(place))
    second, image_2, (since_1,) = back_up(thin, volume, "000000000002", [first])
    check(since_1, image_1, image_2, most=0.8)
    assert sorted(snapshots()) == ["blockferry-000000000001", "blockferry-000000000002"]
    live_in(place, 3, files=40)
    os.sync()
    image_3 = contents(volume)
    check(changed(thin, volume, first), image_1, image_3, most=0.8)
    check(changed(thin, volume, second), image_2, image_3, most=0.8)
    assert not os.path.exists(f"/dev/{GROUP}/blockferry-000000000001")  # kept, but not active
    thin.blockferry_release_checkpoint(first)
    thin.blockferry_release_checkpoint(first)
    assert snapshots() == ["blockferry-000000000002"]
    assert "gone" in declines(thin, volume, first)


@pytest.mark.thorough
def test_every_write_to_a_mounted_xfs_is_in_the_answer(volume: str, mount: Mount) -> None:
    run_small("mkfs.xfs", "-q", volume)
    since, before = begin(thin, volume), contents(volume)
    live_in(mount(volume), 1, files=40)
    os.sync()
    check(changed(thin, volume, since), before, contents(volume), most=0.8)


@pytest.mark.thorough
def test_what_was_discarded_or_zeroed_counts_and_nothing_else(volume: str) -> None:
    with open(volume, "r+b") as disk:
        disk.write(random.Random(1).randbytes(16 * MIB))
    since = begin(thin, volume)
    before = contents(volume)
    assert not changed(thin, volume, since)
    run("blkdiscard", "--offset", str(4 * BLOCK), "--length", str(10 * BLOCK), volume)
    run("blkdiscard", "--zeroout", "--offset", str(30 * BLOCK), "--length", "4096", volume)
    run("dd", "if=/dev/urandom", f"of={volume}", "bs=64k", "seek=300", "count=2", "oflag=direct")
    run("vgchange", "--activate", "n", GROUP)
    run("vgchange", "--activate", "y", GROUP)
    answer = changed(thin, volume, since)
    assert list(answer) == [(4 * BLOCK, 10 * BLOCK), (30 * BLOCK, BLOCK), (300 * BLOCK, 2 * BLOCK)]
    assert differing(before, contents(volume)).align(BLOCK, 32 * MIB) == answer


@pytest.mark.thorough
def test_a_metadata_snapshot_of_somebody_else_is_left_to_them_and_ours_goes(volume: str) -> None:
    since = begin(thin, volume)
    run("dmsetup", "message", POOL, "0", "reserve_metadata_snap")
    reason = declines(thin, volume, since)
    assert "not now" in reason
    assert f"dmsetup message {POOL} 0 release_metadata_snap" in reason
    run("dmsetup", "message", POOL, "0", "release_metadata_snap")  # fails if it had been released
    changed(thin, volume, since)
    assert run("dmsetup", "status", POOL).split()[6] == "-"


@pytest.mark.thorough
def test_it_is_given_up_even_if_the_comparison_fails(
    volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = begin(thin, volume)
    broken = tmp_path / "thin_delta"
    broken.write_text('#!/bin/sh\n/usr/sbin/thin_delta "$@"\n[ "$1" != -V ] || exit 0\necho bad checksum >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "thin_delta: bad checksum" in declines(thin, volume, since)
    assert run("dmsetup", "status", POOL).split()[6] == "-"


@pytest.mark.thorough
def test_only_the_very_snapshot_of_the_very_volume_answers(volume: str, pool: str) -> None:
    since = begin(thin, volume)
    run("lvcreate", "--yes", "--virtualsize", "32M", "--thin", "--name", "other", pool)
    other = f"/dev/{GROUP}/other"
    assert "another logical volume" in declines(thin, other, since)
    others = begin(thin, other, "aaaaaaaaaaaa")
    swapped = others.state | {"origin_uuid": since.state["origin_uuid"]}
    assert "not a snapshot of" in declines(thin, volume, dataclasses.replace(since, state=swapped))
    damaged = dataclasses.replace(since, state={"origin_uuid": since.state["origin_uuid"], "snapshot_uuid": '"'})
    assert "names no logical volume" in declines(thin, volume, damaged)
    assert declines_to_begin(dmsnapshot, volume) == []
    thin.blockferry_release_checkpoint(others)
    run("lvremove", "--yes", "--force", f"{GROUP}/other")
    run("lvextend", "--quiet", "--size", "36M", f"{GROUP}/data")
    assert "size" in declines(thin, volume, since)
    name = f"{GROUP}/blockferry-0123456789ab"
    run("lvremove", "--yes", name)
    run("lvcreate", "--snapshot", "--name", name, "--addtag", "blockferry-checkpoint", volume)
    assert "gone" in declines(thin, volume, since)
    thin.blockferry_release_checkpoint(since)
    assert len(snapshots()) == 1  # another's of the same name is left alone
