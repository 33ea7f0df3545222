"""With device-mapper a guard is in the path of writes only while a backup runs, and none of them slips by between."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cluster_load
from blockferry.cluster import daemon
from blockferry.cluster import epoch as words
from blockferry.cluster.coordinator import Coordinator, unguarded_hosts
from blockferry.cluster.index import LogIndex
from blockferry.errors import BlockferryError
from cluster.test_backup import back_up, writes_of
from cluster_hosts_support import MIB, VOLUME, SharingHost, sharing, wait_until
from cluster_support import open_index
from commands_support import Depot, new_depot, run
from conftest import Attach, Mount

pytestmark = pytest.mark.root

SIZE = 8 * MIB
ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_INSTANTS", "20"))
THOROUGH = pytest.mark.thorough


@pytest.fixture
def volume(tmp_path: Path, attach: Attach) -> str:
    image = tmp_path / "volume.img"
    image.write_bytes(random.Random(5).randbytes(SIZE))
    return attach(image)


@pytest.fixture
def host(tmp_path: Path, volume: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharingHost]:
    """A host with an index of its own, whose guard is not started."""
    with sharing(1, tmp_path, volume, f"sqlite://{tmp_path / 'index'}") as (made,):
        monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", made.env["BLOCKFERRY_RUNTIME_DIR"])
        yield made


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return new_depot("restic", tmp_path / "repository")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LogIndex]:
    with contextlib.closing(open_index(f"sqlite://{tmp_path / 'index'}")) as opened:
        yield opened


class Writer(threading.Thread):
    """Overwrites files on a mounted filesystem, and syncs each, until it is told to end or cannot."""

    def __init__(self, place: Path) -> None:
        super().__init__(daemon=True)
        self.place = place
        self.written: dict[str, str] = {}
        self.count = 0
        self.failure: OSError | None = None
        self.ending = threading.Event()

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                name, data = f"new-{self.count % 12}", self.count.to_bytes(8, "big") * 12_000
                with (self.place / name).open("wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
                self.written[name] = hashlib.sha256(data).hexdigest()
                self.count += 1
        except OSError as error:
            self.failure = error

    def goes_on(self) -> None:
        before = self.count
        wait_until(lambda: self.failure or self.count > before + 2)
        assert self.failure is None

    def end(self) -> None:
        self.ending.set()
        self.join(30)
        assert self.failure is None


def digests(place: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in place.glob("new-*")}


def status() -> dict[str, Any]:
    return daemon.ask(VOLUME, {"do": "status"})


def is_led(host: SharingHost, way: str) -> None:
    """Wait until the users' device of a host leads that way, and assert that what the kernel says is the same."""
    wait_until(lambda: status()["path"] == way)
    (below,) = Path("/sys/block", Path(host.device).resolve().name, "slaves").iterdir()
    assert (below.name == Path(host.volume).name) == (way == "direct")


def kill(host: SharingHost) -> None:
    number = host.guard_process()
    os.kill(number, signal.SIGKILL)
    wait_until(lambda: number not in host.processes())


@contextlib.contextmanager
def epoch(
    index: LogIndex, hosts: list[str], at_the_instant: Callable[[], None] = lambda: None
) -> Iterator[Coordinator]:
    """Give an epoch of some hosts that has come to its instant."""
    coordinator = Coordinator(index, VOLUME, SIZE, hosts)
    try:
        coordinator.begin()
        coordinator.hold()
        at_the_instant()
        coordinator.open()
        yield coordinator
    finally:
        coordinator.end()


@pytest.mark.parametrize(("rounds", "writers"), [(3, 2), pytest.param(ROUNDS, 4, marks=THOROUGH)])
def test_no_write_slips_by_when_the_guard_comes_into_the_path(
    host: SharingHost, index: LogIndex, tmp_path: Path, rounds: int, writers: int
) -> None:
    before = Path(host.volume).read_bytes()
    locks = tmp_path / "locks"
    locks.touch()
    assert host.start()["device"].startswith("/dev/mapper/blockferry-guard-shared")
    for seed in range(writers):
        host.start_load(locks, seed + 1)
    wait_until(lambda: len(writes_of([host])) > writers)
    for _ in range(rounds):
        is_led(host, "direct")
        image, instant = at_an_instant(index, host, tmp_path / "log")
        cluster_load.check(image, before, writes_of([host]), instant)
    is_led(host, "direct")
    assert host.stop_loads() == [0] * writers
    cluster_load.check(_on(host.volume), before, writes_of([host]), time.time_ns())


def at_an_instant(index: LogIndex, host: SharingHost, spool: Path) -> tuple[bytes, int]:
    """Return a volume as it was at the instant of an epoch, by copy and log, and when that was (ns)."""
    spool.unlink(missing_ok=True)
    instants: list[int] = []
    with epoch(index, [host.name], lambda: instants.append(time.time_ns())) as coordinator:
        wait_until(lambda: status()["bytes_logged"])
        image = bytearray(_on(host.volume))
        coordinator.seal()
        with contextlib.closing(coordinator.gather(spool, lambda _count: None)) as log:
            for offset, data in log.stream(log.extents, MIB):
                image[offset : offset + len(data)] = data
    return bytes(image), instants[0]


def _on(volume: str) -> bytes:
    with open(volume, "rb", buffering=0) as disk:
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return disk.read()


@pytest.mark.thorough
def test_a_mounted_filesystem_is_backed_up_and_outlives_its_guard(
    host: SharingHost, depot: Depot, mount: Mount, tmp_path: Path
) -> None:
    host.start()
    run("mke2fs", "-q", "-t", "ext4", host.device)
    place = mount(host.device)
    writer = Writer(place)
    writer.start()
    writer.goes_on()
    said = back_up(depot, host)
    writer.goes_on()
    is_led(host, "direct")
    assert depot.ferry("restore", said["snapshot"], tmp_path / "restored.img").code == 0
    run("e2fsck", "-fn", tmp_path / "restored.img")

    kill(host)
    writer.goes_on()
    assert host.start()["device"] == host.device
    writer.end()
    assert digests(place) == writer.written
    run("umount", place)
    assert host.stop().code == 0
    assert not Path(host.device).exists()
    assert digests(mount(host.volume)) == writer.written


@THOROUGH
@pytest.mark.thorough
def test_who_uses_a_device_has_it_whatever_becomes_of_the_guard(
    host: SharingHost, depot: Depot, mount: Mount, index: LogIndex
) -> None:
    host.start()
    run("mke2fs", "-q", "-t", "ext4", host.device)
    place = mount(host.device)
    writer = Writer(place)
    writer.start()
    host.stop().refused(1, "mounted at")
    kill(host)
    depot.ferry("cluster", "backup", host.volume, "--name", VOLUME, **host.env).refused(2, "killed", host.name)
    host.stop().refused(2, "mounted at")
    host.start()
    assert host.stop("--force").code == 0  # the device stays until it is not used any more
    assert unguarded_hosts(index, VOLUME) == [host.name]
    writer.goes_on()
    host.start()
    assert depot.ferry("show", back_up(depot, host)["snapshot"], "--json").json()["stability"] == "frozen"
    writer.end()
    run("umount", place)
    assert host.stop().code == 0
    assert unguarded_hosts(index, VOLUME) == []


@pytest.mark.thorough
def test_what_was_killed_in_the_path_is_led_past_it_by_the_next(host: SharingHost, index: LogIndex) -> None:
    host.start()
    is_led(host, "direct")
    with open(host.device, "r+b", buffering=0) as used, epoch(index, [host.name]) as coordinator:
        is_led(host, "guarded")
        _overwrite(used, b"meanwhile")
        assert status()["bytes_logged"] > 0
        kill(host)
        with pytest.raises(OSError, match="Input/output error"):
            _overwrite(used, b"lost")
        assert host.start()["path"] == "direct"
        _overwrite(used, b"after")
        with pytest.raises(BlockferryError, match=host.name):
            coordinator.seal()
    assert _on(host.volume).startswith(b"after")


def _overwrite(disk: io.FileIO, word: bytes = b"") -> None:
    """Put a word at the beginning of a disk, durably."""
    os.pwrite(disk.fileno(), word + os.urandom(4096 - len(word)), 0)
    os.fsync(disk.fileno())


def _overwrite_by_path(host: SharingHost) -> None:
    with open(host.device, "r+b", buffering=0) as disk:
        _overwrite(disk)


@THOROUGH
@pytest.mark.thorough
def test_a_guard_that_comes_late_logs_unless_somebody_may_have_written_before_it(
    host: SharingHost, index: LogIndex
) -> None:
    with epoch(index, []) as coordinator:
        assert host.start()["path"] == "guarded"
        _overwrite_by_path(host)
        assert status()["bytes_logged"] > 0
        coordinator.seal()
        is_led(host, "direct")
    wait_until(lambda: not status()["epoch"])
    kill(host)
    index.remove(words.host_key(VOLUME, host.name))  # as after ten seconds
    with epoch(index, []) as coordinator:
        _overwrite_by_path(host)
        assert host.start()["path"] == "direct"
        with pytest.raises(BlockferryError, match=host.name):
            coordinator.seal()


@THOROUGH
@pytest.mark.parametrize("fails", ["load", "resume"])
@pytest.mark.thorough
def test_where_the_way_cannot_be_exchanged_writes_go_on(
    host: SharingHost, index: LogIndex, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, broken = tmp_path / "bin", tmp_path / "broken"
    programs.mkdir()
    script = f'#!/bin/sh\n[ "$1" != {fails} ] || [ ! -e {broken} ] || exit 1\nexec /usr/sbin/dmsetup "$@"\n'
    (programs / "dmsetup").write_text(script)
    (programs / "dmsetup").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    host.start()
    is_led(host, "direct")

    broken.touch()
    with pytest.raises(BlockferryError, match="dmsetup"), epoch(index, [host.name]):
        pass
    _overwrite_by_path(host)
    broken.unlink()
    with epoch(index, [host.name]) as coordinator:
        is_led(host, "guarded")
        broken.touch()
        coordinator.seal()
        wait_until(lambda: status()["failure"])
        _overwrite_by_path(host)
        is_led(host, "guarded")
    broken.unlink()
    wait_until(lambda: not status()["epoch"])
    with epoch(index, [host.name]) as coordinator:
        coordinator.seal()
        is_led(host, "direct")
    assert status()["failure"] == ""


@THOROUGH
@pytest.mark.parametrize("why", ["a buffer", "partitions"])
@pytest.mark.thorough
def test_who_cannot_be_led_past_the_guard_stays_guarded(host: SharingHost, why: str) -> None:
    options: list[Any] = ["--buffer", "4M"] if why == "a buffer" else []
    if why == "partitions":
        run("sfdisk", host.volume, input="2048,,L\n")
    said = host.start(*options)
    assert said["path"] == "guarded"
    assert said["device"].startswith("/dev/loop")
    time.sleep(1)
    assert status()["path"] == "guarded"
