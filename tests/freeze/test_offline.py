"""Volumes that nobody writes to: how that is known, and how a writer that comes during the backup is noticed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.errors import UnstableVolumeError, VolumeError
from blockferry.freeze import offline
from blockferry.hookspecs import FreezeOptions, Frozen
from blockferry.snapshot import Stability
from blockferry.volume import Volume
from conftest import Attach, Mount
from freeze_support import hold, keep_open, make_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "vm.img", "ext4", 32 << 20)


def why_not(path: Path | str) -> str:
    """Return why the volume does not count as offline."""
    reasons: list[str] = []
    assert offline.blockferry_freeze(Volume.discover(path), FreezeOptions(), reasons.append) is None
    return " ".join(reasons)


@pytest.fixture
def writer() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the test starts, ended with it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_an_image_that_nobody_writes_to_is_read_in_place(image: Path) -> None:
    with hold(image) as frozen:
        assert frozen.stability is Stability.OFFLINE
        assert frozen.method == "lease against writers"
        assert frozen.volume.path == str(image)
        frozen.check()


def test_an_image_may_be_open_for_reading(image: Path, writer: list[subprocess.Popen[bytes]]) -> None:
    writer.append(keep_open(image, "rb"))
    with hold(image) as frozen:
        assert frozen.stability is Stability.OFFLINE


@pytest.mark.root
def test_an_image_that_a_process_has_open_for_writing_is_in_use(
    image: Path, writer: list[subprocess.Popen[bytes]]
) -> None:
    writer.append(keep_open(image))
    assert f"process {writer[0].pid} (python" in why_not(image)


def test_a_writer_waits_while_the_backup_reads_and_makes_it_fail(
    image: Path, writer: list[subprocess.Popen[bytes]]
) -> None:
    with hold(image) as frozen:
        frozen.check()
        writer.append(subprocess.Popen(["dd", "if=/dev/zero", f"of={image}", "bs=4k", "count=1", "conv=notrunc"]))
        with pytest.raises(VolumeError, match="opened the image for writing"):
            until_raised(frozen)
        assert writer[0].poll() is None, "the lease holds the writer back"
    assert writer[0].wait(timeout=10) == 0


def until_raised(frozen: Frozen) -> None:
    """Check as a backup does, until it raises, for ten seconds at most."""
    for _ in range(200):
        frozen.check()
        time.sleep(0.05)


@pytest.mark.root
def test_a_mounted_image_is_in_use(image: Path, mount: Mount) -> None:
    place = mount(image)
    assert f"is mounted read-write at {place}" in why_not(image)


@pytest.mark.root
def test_an_image_mounted_read_only_is_offline(image: Path, mount: Mount, attach: Attach) -> None:
    place = mount(attach(image), "ro")
    with hold(image) as frozen:
        assert frozen.stability is Stability.OFFLINE
        assert f"mounted read-only at {place}" in frozen.method


@pytest.mark.root
def test_remounting_read_write_and_writing_makes_the_backup_fail(image: Path, mount: Mount, attach: Attach) -> None:
    place = mount(attach(image), "ro")
    with hold(image) as frozen:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        (place / "new").write_bytes(b"new" * 100_000)
        os.sync()
        with pytest.raises(VolumeError, match=f"wrote to /dev/loop.*mounted read-write at {place}"):
            frozen.check()


@pytest.mark.root
def test_an_idle_loop_device_is_held_so_that_nobody_mounts_it(
    image: Path, attach: Attach, mount: Mount, tmp_path: Path
) -> None:
    device = attach(image)
    with hold(image) as frozen:
        assert frozen.stability is Stability.OFFLINE
        assert "loop devices opened exclusively" in frozen.method
        frozen.check()
        assert subprocess.run(["mount", device, str(tmp_path)], capture_output=True, check=False).returncode == 32
    assert mount(device).is_mount()


@pytest.mark.root
def test_what_a_loop_device_held_back_is_in_the_image_when_the_backup_reads(image: Path, attach: Attach) -> None:
    device = attach(image)
    with open(device, "r+b", buffering=0) as raw:
        raw.write(b"written late")
        keeper = os.open(device, os.O_RDONLY)  # the last to close a device pushes out what is dirty
    try:
        with hold(image) as frozen, frozen.volume.open() as disk:
            buffer = bytearray(12)
            disk.read_into(0, memoryview(buffer))
            assert buffer == b"written late"
            frozen.check()
    finally:
        os.close(keeper)


@pytest.mark.root
def test_a_raw_write_to_a_held_device_makes_the_backup_fail(image: Path, attach: Attach) -> None:
    device = attach(image)
    with hold(device) as frozen:
        assert frozen.method == "opened exclusively"
        frozen.check()
        raw = os.open(device, os.O_WRONLY)
        try:
            os.pwrite(raw, b"x", 4096)
            with pytest.raises(VolumeError, match=rf"wrote to {device}.*process {os.getpid()}"):
                until_raised(frozen)
        finally:
            os.close(raw)


@pytest.mark.root
def test_a_device_that_a_process_has_open_for_writing_is_in_use(
    image: Path, attach: Attach, writer: list[subprocess.Popen[bytes]]
) -> None:
    device = attach(image)
    writer.append(keep_open(device))
    assert "has it open for writing" in why_not(device)


@pytest.mark.root
def test_a_btrfs_volume_that_is_mounted_is_in_use(tmp_path: Path, attach: Attach, mount: Mount) -> None:
    device = attach(make_image(tmp_path / "btrfs.img", "btrfs", 128 << 20))
    place = mount(device)
    assert f"{device} is mounted read-write at {place}" in why_not(device)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with hold(device) as frozen:
        assert frozen.method == f"mounted read-only at {place}"


@pytest.mark.root
def test_one_partition_mounted_puts_the_whole_disk_in_use(tmp_path: Path, attach: Attach, mount: Mount) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 96 << 20)
    table = "label: gpt\n,32M\n,32M\n"
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=table, text=True, check=True)
    device = attach(disk, "--partscan")
    subprocess.run(["partx", "--update", device], check=True)  # also where the kernel itself reads no such table
    subprocess.run(["mkfs.ext4", "-q", f"{device}p1"], check=True)
    with hold(device) as frozen:
        assert frozen.method == "opened exclusively"
    place = mount(f"{device}p1")
    assert f"{device}p1 is mounted read-write at {place}" in why_not(device)
    with hold(f"{device}p2") as frozen:
        assert frozen.stability is Stability.OFFLINE
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with hold(device) as frozen:
        assert frozen.method == f"mounted read-only at {place}"
        assert subprocess.run(["mkfs.ext4", "-q", f"{device}p2"], capture_output=True, check=False).returncode != 0


@pytest.mark.root
def test_an_error_in_the_backup_lets_go_of_the_device(image: Path, attach: Attach) -> None:
    device = attach(image)
    with pytest.raises(ZeroDivisionError), hold(device):
        raise ZeroDivisionError
    os.close(os.open(device, os.O_RDONLY | os.O_EXCL))


def test_a_device_or_image_in_use_by_another_thread_of_ours_is_in_use_too(image: Path) -> None:
    begun, done = threading.Event(), threading.Event()

    def write() -> None:
        with image.open("r+b"):
            begun.set()
            done.wait(10)

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(10)
    try:
        with pytest.raises(UnstableVolumeError), hold(image):
            pass
    finally:
        done.set()
        thread.join()
