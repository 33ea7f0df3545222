"""A running machine's disk held still while its guest goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from blockferry.errors import NotNowError, VolumeError
from blockferry.qemu import freeze, qmp
from blockferry.snapshot import Stability
from blockferry.state import exclusive
from blockferry.volume import Volume
from freeze_support import hold, read
from qemu_support import SIZE

pytestmark = pytest.mark.root

BLOCK = 4096


def guest_writes() -> Iterator[tuple[int, bytes]]:
    """Yield what the guest writes, the same for every call: the number of each write says which it was."""
    chance, number = random.Random(3), 0
    while True:
        number += 1
        yield chance.randrange(SIZE // BLOCK) * BLOCK, number.to_bytes(8, "big") * (BLOCK // 8)


def after(writes: int) -> bytes:
    """Return the disk as it is after so many of the guest's writes."""
    disk = bytearray(SIZE)
    for _, (offset, data) in zip(range(writes), guest_writes(), strict=False):
        disk[offset : offset + BLOCK] = data
    return bytes(disk)


def newest(disk: bytes) -> int:
    """Return the number of the last write that a disk holds."""
    return max(int.from_bytes(disk[offset : offset + 8], "big") for offset in range(0, SIZE, BLOCK))


class Guest:
    """A guest that writes one block after another as long as the context lasts."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.done = 0
        self.error: OSError | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        descriptor = os.open(self.machine.guest, os.O_RDWR)
        try:
            for offset, data in guest_writes():
                if self.stopped.is_set():
                    return
                os.pwrite(descriptor, data, offset)
                self.done += 1
        except OSError as error:
            self.error = error
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stopped.set()
        self.thread.join()

    def wait(self, more: int) -> None:
        """Wait until the guest has written so many more blocks."""
        wanted = self.done + more
        while self.done < wanted:
            assert self.error is None
            time.sleep(0.001)


def test_the_disk_is_read_as_it_was_after_one_of_the_guests_writes(machine):
    with Guest(machine) as guest:
        guest.wait(500)
        for _ in range(3):
            before = guest.done
            with hold(machine.name) as frozen:
                within = guest.done
                guest.wait(2000)
                copy = read(frozen)
                guest.wait(500)
                assert read(frozen) == copy
                frozen.check()
            assert before <= newest(copy) <= within + 1
            assert copy == after(newest(copy))
    assert guest.error is None
    assert frozen.stability is Stability.CRASH_CONSISTENT
    assert machine.guest.read_bytes() == after(guest.done)
    assert machine.leftovers() == []


def test_the_filesystem_is_known_once_the_disk_holds_still(machine):
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", machine.guest], check=True)
    assert machine.volume.filesystem == ""
    assert machine.volume.size == SIZE
    with hold(machine.name) as frozen:
        assert frozen.volume.filesystem == "ext4"
        assert frozen.volume.identity == {"image": str(machine.image)}


def test_a_cancelled_job_is_noticed(machine):
    with pytest.raises(VolumeError, match="stopped keeping"), hold(machine.name) as frozen:
        machine.ask("job-cancel", id="blockferry-backup")
        time.sleep(0.1)
        frozen.check()
    assert machine.leftovers() == []


def test_a_job_that_is_cancelled_at_the_very_end_is_noticed(machine):
    with pytest.raises(VolumeError, match="stopped keeping"), hold(machine.name) as frozen:
        frozen.check()
        machine.ask("job-cancel", id="blockferry-backup")


def test_a_machine_that_dies_is_an_error_and_leaves_nothing(machine):
    with pytest.raises(VolumeError), hold(machine.name) as frozen:
        machine.stop(signal.SIGKILL)
        read(frozen)
    machine.start()
    assert machine.leftovers() == []


def test_an_nbd_server_in_use_is_left_alone(machine):
    path = str(machine.directory / "theirs")
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    for _ in range(2):
        with pytest.raises(NotNowError, match="NBD server is in use"), hold(machine.name):
            pass
        assert machine.leftovers() == []
    machine.ask("blockdev-add", driver="null-co", node_name="another")
    machine.ask("block-export-add", type="nbd", id="theirs", node_name="another", name="theirs")
    subprocess.run(["nbdinfo", f"nbd+unix:///theirs?socket={path}"], check=True, capture_output=True)


def test_a_directory_for_temporary_files_that_is_missing_is_named(machine, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(VolumeError, match="/nowhere: No such file"), hold(machine.name):
        pass
    assert machine.leftovers() == []


def test_a_monitor_in_use_is_said_to_be(machine, monkeypatch):
    monkeypatch.setattr(qmp, "_GREETING_SECONDS", 0.5)
    with qmp.connected(str(machine.directory / "qmp")), pytest.raises(NotNowError, match="somebody else"):
        Volume.discover(machine.name)


def test_one_backup_of_a_machine_at_a_time(machine):
    with exclusive(machine.volume), pytest.raises(NotNowError), exclusive(machine.volume):
        pass


def test_no_machine_no_node_and_no_socket_are_named(machine):
    with pytest.raises(VolumeError, match="no block node disk7") as caught:
        Volume.discover(f"qemu:{machine.directory}/qmp:disk7")
    assert "disk0" in caught.value.remedy
    with pytest.raises(VolumeError, match="No such file"):
        Volume.discover(f"qemu:{machine.directory}/none:disk0")
    machine.ask("blockdev-add", driver="null-co", node_name="medium", read_only=True)
    with pytest.raises(VolumeError, match="read-only"):
        Volume.discover(f"qemu:{machine.directory}/qmp:medium")


@pytest.fixture
def small(directory: Path) -> Iterator[None]:
    """Little room for temporary files."""
    image = directory / "small.img"
    image.touch()
    os.truncate(image, 24 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    subprocess.run(["mount", image, directory / "tmp"], check=True)
    yield
    subprocess.run(["umount", directory / "tmp"], check=True)


@pytest.mark.usefixtures("small")
def test_a_guest_is_not_stopped_for_want_of_room(machine):
    machine.write(0, os.urandom(SIZE))
    with pytest.raises(VolumeError, match="too little room"), hold(machine.name) as frozen:
        for offset in range(0, SIZE, 1 << 20):
            machine.write(offset, bytes(1 << 20))  # fails if the machine cannot keep what was there
            time.sleep(0.02)
        frozen.check()
    assert machine.guest.read_bytes() == bytes(SIZE)
    assert machine.leftovers() == []


HOLDER = """
import sys, time
from blockferry.qemu import freeze
from blockferry.volume import Volume
with freeze.blockferry_freeze(Volume.discover(sys.argv[1])) as frozen:
    print(frozen.volume.path, flush=True)
    time.sleep(60)
"""


def holder(machine) -> subprocess.Popen[bytes]:
    """Start a process that holds the disk still; return when it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, machine.name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().strip()
    process.stdout.close()
    return process


def children(pid: int, word: str) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and word in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_backup_is_cleaned_up_after(machine):
    process = holder(machine)
    assert "blockferry-backup" in machine.leftovers()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while machine.leftovers():
        assert time.monotonic() < deadline, machine.leftovers()
        time.sleep(0.05)


@pytest.mark.parametrize("restarted", [False, True], ids=["machine runs on", "machine restarted"])
def test_what_is_left_when_the_watchdog_is_killed_too_goes_at_the_next_backup(machine, restarted):
    process = holder(machine)
    (dog,) = children(process.pid, "blockferry.qemu.watchdog")
    os.kill(dog, signal.SIGKILL)
    process.kill()
    process.wait()
    assert "blockferry-backup" in machine.leftovers()
    if restarted:
        machine.stop(signal.SIGKILL)
        machine.start()
    assert [each for each in machine.leftovers() if "blockferry-qemu-" in each]
    machine.write(0, b"x" * BLOCK)
    with hold(machine.name) as frozen:
        assert read(frozen)[:BLOCK] == b"x" * BLOCK
    assert machine.leftovers() == []


def test_other_volumes_are_not_its_business(tmp_path):
    path = tmp_path / "plain.img"
    path.write_bytes(b"x" * 4096)
    assert freeze.blockferry_freeze(Volume.discover(path)) is None
