"""What is written to a device, by real bpftrace on real loop devices, compared with what really differs."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from blockferry.changed.bpf import tracker
from blockferry.changed.bpf.device import numbers_of
from blockferry.changed.bpf.protocol import socket_path
from blockferry.extents import ExtentSet
from blockferry.hookspecs import Checkpoint
from blockferry.volume import Volume
from changed_support import CHUNK, Asked, assert_covers, copy, difference, eventually, why_no_bpftrace
from commands_support import blockferry, command, run
from conftest import Attach, Mount

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_no_bpftrace()), reason=why_no_bpftrace())]

MIB = 1 << 20
Track = Callable[..., Asked]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path: a socket's name has room for 108 characters."""
    with TemporaryDirectory(prefix="bf-", dir="/run") as directory:
        monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 64 MiB with a pattern, so that zeroing it shows."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB) * 64)
    return path


@pytest.fixture
def track(runtime_directory: Path) -> Iterator[Track]:
    """Return a function that has a device tracked until the test ends."""
    with contextlib.ExitStack() as tracked:

        def start(device: str) -> Asked:
            said = blockferry("track", "start", device, "--json").json()
            assert said["volume"] == device
            tracked.callback(blockferry, "track", "stop", device)
            return Asked(tracker, device)

        yield start


def write(device: str, offset: int, data: bytes) -> None:
    """Write past the page cache."""
    with mmap.mmap(-1, len(data)) as aligned:
        aligned[:] = data
        descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
        try:
            assert os.pwrite(descriptor, aligned, offset) == len(data)
        finally:
            os.close(descriptor)


def partitioned(image: Path, attach: Attach) -> str:
    """Return a loop device with a partition at 1 MiB and one that begins amid a chunk, at sector 40,001."""
    table = "label: dos\nstart=2048, size=32768\nstart=40001, size=60000\n"
    subprocess.run(["sfdisk", "--quiet", str(image)], input=table, text=True, check=True)
    device = attach(image, "--partscan")
    run("partx", "--update", device)
    eventually(lambda: Path(f"{device}p2").is_block_device())
    return device


def processes(session: str) -> list[int]:
    """Return the bpftrace processes that a tracking process started."""
    children = Path(f"/proc/{session}/task/{session}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "bpftrace\n"]


def status(device: str) -> dict[str, Any]:
    (said,) = blockferry("track", "status", device, "--json").json()["tracked"]
    return dict(said)


def daemon(device: str) -> int:
    return int(status(device)["process"])


def test_a_write_past_the_page_cache_is_one_chunk(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    write(device, 3 * CHUNK, b"before" + bytes(4090))
    since = asked.checkpoint()
    assert not asked.changed(since)
    write(device, 5 * CHUNK + 4096, bytes(4096))
    write(device, 9 * CHUNK - 4096, bytes(8192))
    os.pread(os.open(device, os.O_RDONLY), 4096, 20 * CHUNK)
    assert asked.changed(since) == ExtentSet.from_pairs([(5 * CHUNK, CHUNK), (8 * CHUNK, 2 * CHUNK)])


def test_the_last_bytes_of_a_device_that_ends_amid_a_chunk_are_seen(
    tmp_path: Path, attach: Attach, track: Track
) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(bytes(MIB + 4096))
    asked = track(attach(image))
    since = asked.checkpoint()
    write(str(asked.path), MIB, b"x" * 4096)
    assert asked.changed(since) == ExtentSet.from_pairs([(MIB, 4096)])


def test_what_a_filesystem_writes_and_discards_is_seen(image: Path, attach: Attach, mount: Mount, track: Track) -> None:
    device = attach(image)
    run("mke2fs", "-q", "-F", "-t", "ext4", device)
    place = mount(device)
    (place / "old").write_bytes(random.Random(2).randbytes(8 * MIB))
    run("sync", "-f", place)
    asked = track(device)
    since = asked.checkpoint()
    before = copy(image, "before.img")
    (place / "new").write_bytes(random.Random(3).randbytes(3 * MIB))
    with (place / "old").open("r+b") as old:
        old.seek(5 * MIB)
        old.write(b"overwritten")
    run("sync", "-f", place)
    written = asked.changed(since)
    assert_covers(written, difference(before, image))
    assert written.total < 8 * MIB
    (place / "old").unlink()
    run("sync", "-f", place)
    run("fstrim", place)
    trimmed = asked.changed(since)
    assert_covers(trimmed, difference(before, image))
    assert trimmed.total >= written.total + 8 * MIB  # the discarded blocks


@pytest.mark.parametrize("how", [[], ["--zeroout"]], ids=["discarded", "zeroed"])
def test_large_ranges_take_few_places(image: Path, attach: Attach, track: Track, how: list[str]) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    run("blkdiscard", *how, "--force", "--offset", 8 * MIB, "--length", 40 * MIB, device)
    assert asked.changed(since) == ExtentSet.from_pairs([(8 * MIB, 40 * MIB)])


def test_a_disk_s_writes_count_by_whatever_name_they_come(image: Path, attach: Attach, track: Track) -> None:
    device = partitioned(image, attach)
    asked = track(device)
    since = asked.checkpoint()
    before = copy(image, "before.img")
    write(f"{device}p1", 3 * MIB, b"1" * 4096)
    write(f"{device}p2", 0, b"2" * 4096)
    write(device, 60 * MIB, b"0" * 4096)
    with open(f"{device}p2", "r+b") as buffered:
        buffered.seek(10 * MIB)
        buffered.write(b"3" * 100_000)
        os.fsync(buffered.fileno())
    answer = asked.changed(since)
    assert_covers(answer, difference(before, image))
    assert answer.covers(4 * MIB, 4 * MIB + 4096)
    assert answer.covers(40001 * 512, 40001 * 512 + 4096)
    assert answer.total < 8 * CHUNK


def test_a_partition_s_writes_count_by_whatever_name_they_come(image: Path, attach: Attach, track: Track) -> None:
    device = partitioned(image, attach)
    asked = track(f"{device}p2")
    since = asked.checkpoint()
    start, size = 40001 * 512, 60000 * 512
    before = image.read_bytes()[start : start + size]
    write(f"{device}p1", 8 * MIB, b"1" * 4096)  # not the partition's
    write(f"{device}p2", 16 * MIB, b"2" * 4096)
    write(f"{device}p2", size - 4096, b"2" * 4096)
    write(device, start - 512 + 4096, b"0" * 4096)
    write(device, start - 512, b"0" * 4096)  # only the last seven eighths are the partition's
    answer = asked.changed(since)
    assert_covers(answer, difference(before, image.read_bytes()[start : start + size]))
    assert answer.covers(size - 4096, size)
    assert answer.total <= 4 * CHUNK
    assert not answer.clip(CHUNK, 16 * MIB - CHUNK)


def test_no_write_falls_between_generations_under_constant_writing(
    image: Path, attach: Attach, mount: Mount, track: Track
) -> None:
    """Five backups in the order in which blockferry makes them, while threads write without a pause."""
    device = attach(image)
    run("mke2fs", "-q", "-F", "-t", "ext4", device)
    place = mount(device)
    (place / "file").write_bytes(bytes(40 * MIB))
    run("sync", "-f", place)
    asked = track(device)
    enough = threading.Event()

    def write_all_the_time(seed: int) -> None:
        chance = random.Random(seed)
        descriptor = os.open(place / "file", os.O_WRONLY | os.O_DSYNC)
        while not enough.is_set():
            os.pwrite(descriptor, chance.randbytes(512), chance.randrange(40 * MIB - 512))
        os.close(descriptor)

    writers = [threading.Thread(target=write_all_the_time, args=[seed]) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    checkpoints, copies = [], []
    try:
        for number in range(5):
            time.sleep(0.1)
            checkpoint = asked.checkpoint(str(number))
            run("fsfreeze", "--freeze", place)
            try:
                for since, earlier in zip(checkpoints, copies, strict=True):
                    truth = difference(earlier, image)
                    answer = asked.changed(since)
                    assert_covers(answer, truth)
                checkpoints.append(checkpoint)
                copies.append(copy(image, f"copy-{number}.img"))
            finally:
                run("fsfreeze", "--unfreeze", place)
    finally:
        enough.set()
        for writer in writers:
            writer.join()
    run("fsfreeze", "--freeze", place)
    try:
        latest = asked.changed(checkpoints[-1])
        assert_covers(latest, difference(copies[-1], image))
        assert latest.total < asked.changed(checkpoints[0]).total
    finally:
        run("fsfreeze", "--unfreeze", place)


def test_an_answer_holds_what_was_written_since_the_last_one(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    expected = ExtentSet.empty()
    for number in (1, 5, 9):
        write(device, number * MIB, b"x" * 4096)
        expected = expected.union(ExtentSet.from_pairs([(number * MIB, CHUNK)]))
        assert asked.changed(since) == expected


def test_asking_while_somebody_writes_loses_nothing(image: Path, attach: Attach, track: Track) -> None:
    """Each chunk is written once, in turn, so that one that falls between two generations is missed."""
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    enough, written = threading.Event(), []

    def write_each_chunk_once() -> None:
        for number in range(64 * MIB // CHUNK):
            write(device, number * CHUNK, b"x" * 512)
            written.append(number)
            if enough.wait(0.01):
                return

    writer = threading.Thread(target=write_each_chunk_once)
    writer.start()
    try:
        for _ in range(3):
            asked.changed(since)
    finally:
        enough.set()
        writer.join()
    assert asked.changed(since) == ExtentSet.whole(len(written) * CHUNK)


def test_a_killed_bpftrace_is_noticed_and_the_next_checkpoint_begins_anew(
    image: Path, attach: Attach, track: Track
) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    for process in processes(str(daemon(device))):
        os.kill(process, signal.SIGKILL)
    assert "bpftrace ended" in asked.declined(since)
    again = asked.checkpoint()
    write(device, 0, b"x" * 4096)
    assert asked.changed(again) == ExtentSet.whole(CHUNK)
    assert "bpftrace ended" in asked.declined(since)


@pytest.mark.parametrize("which", ["the newest", "an older one"])
def test_a_bpftrace_that_ends_before_it_is_told_to_is_not_believed(
    image: Path, attach: Attach, track: Track, which: str
) -> None:
    device = attach(image)
    asked = track(device)
    first = asked.checkpoint()
    second = asked.checkpoint()
    older, newer = sorted(processes(str(daemon(device))))
    os.kill(newer if which == "the newest" else older, signal.SIGINT)  # prints its map and ends with status 0
    reason = "bpftrace ended"
    eventually(lambda: reason in status(device)["lost"])
    assert reason in asked.declined(first)
    if which == "the newest":
        assert reason in asked.declined(second)
    else:
        assert not asked.changed(second)


def test_a_killed_tracking_process_leaves_nothing_to_believe_or_to_clean_up(
    image: Path, attach: Attach, track: Track
) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    tracking = daemon(device)
    left = processes(str(tracking))
    assert left
    os.kill(tracking, signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{each}").exists() for each in left))
    assert "was killed" in asked.declined(since)
    (reason,) = asked.no_checkpoint()
    assert "track start" in reason
    assert "stopped and started" in track(device).declined(since)


def test_a_full_map_is_noticed(image: Path, attach: Attach, track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_BPF_KEYS", "16")
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    for number in range(15):
        write(device, number * CHUNK, bytes(4096))
    assert asked.changed(since).total == 15 * CHUNK
    since = asked.checkpoint()
    for number in range(100):
        write(device, number * CHUNK, bytes(4096))
    assert "more was written than bpftrace could note" in asked.declined(since)
    assert not asked.changed(asked.checkpoint())


def test_the_map_is_emptied_now_and_then(
    image: Path, attach: Attach, track: Track, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_BPF_KEYS", "100")
    monkeypatch.setenv("BLOCKFERRY_BPF_RENEW_AFTER", "1")
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    written = ExtentSet.empty()
    for batch in range(3):
        numbers = range(batch * 320, (batch + 1) * 320, 4)
        for number in numbers:
            write(device, number * CHUNK, bytes(4096))
        written = written.union(ExtentSet.from_pairs((number * CHUNK, CHUNK) for number in numbers))
        ended = len(written)
        eventually(lambda ended=ended: status(device)["extents"] == ended)
    assert asked.changed(since) == written


def test_a_loop_device_on_another_file_is_not_the_same(image: Path, track: Track, tmp_path: Path) -> None:
    other = copy(image, "other.img")
    device = run("losetup", "--find", "--show", image).strip()
    try:
        asked = track(device)
        since = asked.checkpoint()
        run("losetup", "--detach", device)
        eventually(lambda: not Path(f"/sys/block/{Path(device).name}/loop").exists())
        run("losetup", device, other)
        assert "detached, replaced" in asked.declined(since)
        write(device, 0, b"x" * 4096)
        assert "detached, replaced" in asked.declined(since)
        again = asked.checkpoint()
        write(device, MIB, b"x" * 4096)
        assert asked.changed(again) == ExtentSet.from_pairs([(MIB, CHUNK)])
    finally:
        run("losetup", "--detach", device)


def test_a_loop_device_with_another_offset_is_not_the_same(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image, "--sizelimit", str(32 * MIB))
    asked = track(device)
    since = asked.checkpoint()
    set_offset(device, MIB, 32 * MIB)
    assert "mapped to something else" in asked.declined(since)


def set_offset(device: str, offset: int, size: int) -> None:
    """Show another window of the file, by LOOP_SET_STATUS64 of linux/loop.h: losetup does it only when it attaches."""
    status = struct.pack("=QQQQQIIII64s64s32sQQ", 0, 0, 0, offset, size, 0, 0, 0, 0, b"", b"", b"", 0, 0)
    with open(device, "rb") as loop:
        fcntl.ioctl(loop, 0x4C04, status)


def test_a_device_that_grew_is_not_the_same(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    os.truncate(image, 80 * MIB)
    run("losetup", "--set-capacity", device)
    assert "size" in asked.declined(since)


def test_partitions_may_come_and_go(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    subprocess.run(["sfdisk", "--quiet", str(image)], input="label: dos\nstart=2048\n", text=True, check=True)
    run("partx", "--add", device)
    eventually(lambda: Path(f"{device}p1").is_block_device())
    write(f"{device}p1", 0, b"x" * 4096)
    run("partx", "--delete", device)
    assert asked.changed(since) == ExtentSet.from_pairs([(MIB, CHUNK)])


def test_stopping_and_starting_forgets(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    since = asked.checkpoint()
    assert blockferry("track", "stop", device).code == 0
    assert "is not tracked" in asked.declined(since)
    assert "stopped and started" in track(device).declined(since)


def test_releasing_forgets_a_checkpoint_and_nothing_else(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    asked = track(device)
    checkpoints = []
    for number in range(5):
        checkpoints.append(asked.checkpoint(str(number)))
        write(device, number * MIB, b"x" * 4096)
    for number in (1, 2, 1):
        tracker.blockferry_release_checkpoint(checkpoints[number])
    assert "not kept" in asked.declined(checkpoints[1])
    for first in (0, 3, 4):
        expected = ExtentSet.from_pairs((number * MIB, CHUNK) for number in range(first, 5))
        assert asked.changed(checkpoints[first]) == expected
    for checkpoint in checkpoints:
        tracker.blockferry_release_checkpoint(checkpoint)
    assert (status(device)["checkpoints"], status(device)["extents"]) == (0, 0)


def test_who_never_asked_for_tracking_hears_nothing_of_it(image: Path, attach: Attach, runtime_directory: Path) -> None:
    assert Asked(tracker, attach(image)).no_checkpoint() == []
    assert Asked(tracker, image).no_checkpoint() == []
    assert list(runtime_directory.iterdir()) == []


def test_the_file_behind_a_tracked_loop_device_is_not_tracked(image: Path, attach: Attach, track: Track) -> None:
    asked = track(attach(image))
    assert Asked(tracker, image).no_checkpoint() == []
    assert "is not the device" in Asked(tracker, image).declined(asked.checkpoint())


def test_a_checkpoint_of_another_tracker_is_not_ours(image: Path, attach: Attach) -> None:
    def declined(reason: str) -> None:
        raise AssertionError(reason)

    since = Checkpoint("reflink", "snapshot", {})
    assert tracker.blockferry_changed_extents(Volume.discover(attach(image)), since, declined) is None
    tracker.blockferry_release_checkpoint(since)


def test_the_commands_say_what_is_tracked(image: Path, attach: Attach, track: Track) -> None:
    device = attach(image)
    assert blockferry("track", "status", device, "--json").code == 1
    track(device)
    once = blockferry("track", "start", device, "--json").json()
    (said,) = blockferry("track", "status", "--json").json()["tracked"]
    assert said["session"] == once["session"]
    assert said["volume"] == device
    assert device in blockferry("track", "status").out
    blockferry("track", "start", "--foreground", device).refused(75, "tracked already")
    assert blockferry("track", "stop", device, "--json").json()["session"] == once["session"]
    blockferry("track", "stop", device).refused(1, "is not tracked")


def test_what_is_no_block_device_is_refused(image: Path) -> None:
    blockferry("track", "start", image).refused(1, "only block devices", "loop device")
    blockferry("track", "start", "/dev/not-there").refused(1, "/dev/not-there")


def test_memory_is_refused() -> None:
    """zram: pages are given to it one by one, past the block layer, by older kernels."""
    if not Path("/dev/zram0").is_block_device():
        pytest.skip("needs a zram device: modprobe zram")
    blockferry("track", "start", "/dev/zram0").refused(1, "/dev/zram0", "memory")


def test_systemd_is_told_when_tracking_is_on_and_ends_it_by_a_signal(
    image: Path, attach: Attach, runtime_directory: Path
) -> None:
    device = attach(image)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(runtime_directory / "notify"))
        systemd.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(runtime_directory / "notify")}
        with subprocess.Popen(command("track", "start", "--foreground", device), env=environment) as process:
            assert systemd.recv(100) == b"READY=1"
            assert Asked(tracker, device).checkpoint()
            left = processes(str(process.pid))
            process.terminate()
            assert process.wait(30) == 0
    assert not any(Path(f"/proc/{each}").exists() for each in left)
    assert not socket_path(numbers_of(device)).exists()


def test_nobody_else_is_answered(image: Path, attach: Attach, track: Track, runtime_directory: Path) -> None:
    device = attach(image)
    asked = track(device)
    place = socket_path(numbers_of(device))
    assert place.parent.stat().st_mode & 0o777 == 0o700
    for path, mode in ((runtime_directory, 0o755), (place.parent, 0o755), (place, 0o777)):
        path.chmod(mode)
    question = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        """s.sendall(b'{"do": "stop"}\\n'); print(s.recv(1000))"""
    )
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", question]
    done = subprocess.run([*nobody, str(place)], capture_output=True, text=True, check=False)
    assert done.stdout in ("", "b''\n"), done
    place.parent.chmod(0o700)
    assert asked.checkpoint()
