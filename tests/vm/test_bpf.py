"""Tracking by bpftrace under a stock kernel, and of device-mapper devices, whose content changes with their table."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from blockferry.changed.bpf import tracker
from blockferry.extents import ExtentSet
from changed_support import CHUNK, Asked, why_no_bpftrace
from commands_support import blockferry, run
from conftest import Attach

MIB = 1 << 20
SECTORS = 64 * MIB // 512

if why_no_bpftrace():
    pytest.skip(why_no_bpftrace(), allow_module_level=True)


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not Path("/sys/kernel/debug/sched").exists():
        run("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")
    with TemporaryDirectory(prefix="bf-", dir="/run") as directory:
        monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", directory)
        yield


@pytest.fixture
def disk(tmp_path: Path, attach: Attach) -> str:
    """A loop device of 64 MiB."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB) * 64)
    return attach(image)


@pytest.fixture
def mapped(disk: str) -> Iterator[Path]:
    """The device bf-top: all of the disk."""
    run("dmsetup", "create", "bf-top", "--table", f"0 {SECTORS} linear {disk} 0")
    run("udevadm", "settle") if Path("/run/udev").exists() else run("dmsetup", "mknodes")
    yield Path("/dev/mapper/bf-top")
    for name in ("bf-top", "bf-merge", "bf-real", "bf-cow"):
        subprocess.run(["dmsetup", "remove", "--retry", name], check=False, capture_output=True)


@pytest.fixture
def track() -> Iterator[list[Asked]]:
    tracked: list[Asked] = []
    yield tracked
    for asked in tracked:
        blockferry("track", "stop", asked.path)


def tracked(track: list[Asked], device: object) -> Asked:
    said = blockferry("track", "start", device, "--json").json()
    assert said["lost"] == ""
    track.append(Asked(tracker, Path(str(device))))
    return track[-1]


def write(device: object, offset: int) -> None:
    run("dd", "if=/dev/urandom", f"of={device}", "bs=4096", "count=1", f"seek={offset // 4096}", "oflag=direct")


def reload(name: str, table: str) -> None:
    run("dmsetup", "suspend", name)
    run("dmsetup", "load", name, "--table", table)
    run("dmsetup", "resume", name)


@pytest.mark.thorough
def test_a_mapped_device_and_what_lies_below_it_are_tracked(disk: str, mapped: Path, track: list[Asked]) -> None:
    above, below = tracked(track, mapped), tracked(track, disk)
    since_above, since_below = above.checkpoint(), below.checkpoint()
    write(mapped, 5 * MIB)
    run("blkdiscard", "--offset", 8 * MIB, "--length", 16 * MIB, mapped)
    expected = ExtentSet.from_pairs([(5 * MIB, CHUNK), (8 * MIB, 16 * MIB)])
    assert above.changed(since_above) == expected
    assert below.changed(since_below) == expected


@pytest.mark.thorough
def test_a_snapshot_s_wrapping_is_no_change_and_another_table_is(disk: str, mapped: Path, track: list[Asked]) -> None:
    asked = tracked(track, mapped)
    since = asked.checkpoint()
    write(mapped, 5 * MIB)
    run("dmsetup", "create", "bf-real", "--table", f"0 {SECTORS} linear {disk} 0")
    reload("bf-top", f"0 {SECTORS} snapshot-origin /dev/mapper/bf-real")
    write(mapped, 6 * MIB)
    assert asked.changed(since) == ExtentSet.from_pairs([(5 * MIB, CHUNK), (6 * MIB, CHUNK)])
    reload("bf-top", f"0 {SECTORS} linear {disk} 0")
    assert asked.changed(since) == ExtentSet.from_pairs([(5 * MIB, CHUNK), (6 * MIB, CHUNK)])
    reload("bf-top", f"0 {SECTORS // 2} linear {disk} 0\n{SECTORS // 2} {SECTORS // 2} zero")
    assert "mapped to something else" in asked.declined(since)


@pytest.mark.thorough
def test_merging_a_snapshot_back_is_noticed(
    disk: str, mapped: Path, track: list[Asked], tmp_path: Path, attach: Attach
) -> None:
    asked = tracked(track, mapped)
    since = asked.checkpoint()
    (tmp_path / "cow").write_bytes(bytes(16 * MIB))
    cow = attach(tmp_path / "cow")
    run("dmsetup", "create", "bf-real", "--table", f"0 {SECTORS} linear {disk} 0")
    run("dmsetup", "create", "bf-cow", "--table", f"0 {SECTORS} snapshot /dev/mapper/bf-real {cow} P 8")
    write("/dev/mapper/bf-cow", MIB)
    run("dmsetup", "remove", "--retry", "bf-cow")
    reload("bf-top", f"0 {SECTORS} snapshot-merge /dev/mapper/bf-real {cow} P 8")
    assert "merged back" in asked.declined(since)
    reload("bf-top", f"0 {SECTORS} linear {disk} 0")
    assert "merged back" in asked.declined(since)


@pytest.mark.thorough
def test_a_kernel_that_preempts_itself_without_counting_is_refused(disk: str) -> None:
    preemption = Path("/sys/kernel/debug/sched/preempt")
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 7):
        pytest.skip("needs a kernel before 6.7")
    before = preemption.read_text().split("(")[1].split(")")[0]
    preemption.write_text("full")
    try:
        blockferry("track", "start", disk).refused(1, "withhold events", "preempt=voluntary")
    finally:
        preemption.write_text(before)
