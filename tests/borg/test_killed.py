"""Whoever is killed, and whenever: no snapshot that is not whole, no lock that stays, and the next backup works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blockferry.blockmap import BlockMap
from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry_borg.client import BATCH
from borg_support import MIB, Volume, content, newest, store

SIZE = 60 * MIB
WHOLE = BlockMap.build(SIZE, data=ExtentSet.whole(SIZE))


class WatchedVolume(Volume):
    """A volume that does something once so many bytes were read of it."""

    def __init__(self, *arguments, at: int, act) -> None:
        super().__init__(*arguments)
        self.at, self.act = at, act

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        if self.act and self.bytes_read >= self.at:
            act, self.act = self.act, None
            act()


def workers() -> list[int]:
    """Return the processes of workers that this process, or any other of this test, has running."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            ours = f"TEST_NAME={os.environ['TEST_NAME']}".encode() in environment.split(b"\0")
            if ours and any(word.endswith(b"blockferry_borg/worker/__main__.py") for word in command):
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def named(request, monkeypatch):
    monkeypatch.setenv("TEST_NAME", f"{os.getpid()}-{request.node.name}")


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that never happened"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_killed_at_any_point_leaves_no_snapshot(place, open_repository):
    drawn = random.Random(place.borg)
    repository = open_repository(place)
    for seed in range(4):

        def kill() -> None:
            (worker,) = workers()
            delay = drawn.uniform(0, 0.3)
            threading.Timer(delay, os.kill, (worker, signal.SIGKILL)).start()

        volume = WatchedVolume(content(SIZE, seed), at=drawn.randrange(SIZE), act=kill)
        try:
            store(repository, volume, WHOLE)
        except BlockferryError as error:
            assert "status -9" in str(error)
        else:  # it was faster than the timer
            wait_until(lambda: not workers())
            repository.close()
            assert len(repository.snapshots()) == 1
        # Killed between its commit and its word, it has left a snapshot that is whole.
        for snapshot in repository.snapshots():
            assert place.extract(snapshot.archive) == content(SIZE, seed).tobytes()
            repository.delete([snapshot])
    stored = store(repository, Volume(content(SIZE, 99)), WHOLE)
    assert place.archives() == [stored.snapshot.archive]
    assert place.extract(stored.snapshot.archive) == content(SIZE, 99).tobytes()
    place.check()


PARENT = """
import os, sys, time
sys.path[:0] = {path!r}
from blockferry_borg.plugin import blockferry_open_repository
from borg_support import MIB, Volume, content, store
from blockferry.blockmap import BlockMap
from blockferry.extents import ExtentSet

class Slow(Volume):
    def read_into(self, offset, buffer):
        super().read_into(offset, buffer)
        if offset >= 40 * MIB:
            print("here", flush=True)
            time.sleep(600)

repository = blockferry_open_repository("borg:{location}", os.environ)
store(repository, Slow(content(60 * MIB)), BlockMap.build(60 * MIB, data=ExtentSet.whole(60 * MIB)))
"""


def start_parent(place) -> subprocess.Popen:
    script = PARENT.format(path=[path for path in sys.path if path], location=place.location)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"here\n"
    assert len(workers()) == 1
    return parent


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_when_the_parent_dies_the_worker_lets_go_and_ends(kill, place, open_repository):
    with start_parent(place) as parent:
        parent.send_signal(kill)
    wait_until(lambda: not workers())
    assert not Path(place.location, "lock.exclusive").exists()
    repository = open_repository(place)
    assert repository.snapshots() == []
    stored = store(repository, Volume(content(SIZE)), WHOLE)
    assert place.archives() == [stored.snapshot.archive]


@newest
def test_a_lock_left_by_both_being_killed_is_taken_over(place, open_repository):
    with start_parent(place) as parent:
        (worker,) = workers()
        for process in (worker, parent.pid):
            os.kill(process, signal.SIGKILL)
    # Until somebody has asked for its exit status, borg takes the owner of a lock to be alive.
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert Path(place.location, "lock.exclusive").exists()
    stored = store(open_repository(place), Volume(content(SIZE)), WHOLE)
    assert place.archives() == [stored.snapshot.archive]
    place.check()


@newest
def test_a_worker_that_is_told_to_end_rolls_back(place, open_repository):
    with start_parent(place) as parent:
        (worker,) = workers()
        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not workers())
        assert not Path(place.location, "lock.exclusive").exists()
        parent.kill()
    assert place.archives() == []


@pytest.mark.slow
def test_what_a_killed_run_had_stored_is_used_by_the_next(place, open_repository, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG_CHECKPOINT", "1")
    repository = open_repository(place)

    def kill() -> None:
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)

    def indexes() -> list[str]:
        """Every commit writes a new index under a name of its own (borg, Internals: Repository)."""
        return sorted(path.name for path in Path(place.location).glob("index.*"))

    def checkpoints() -> list[str]:
        listed = place.run("list", "--consider-checkpoints", "--short", place.location)
        return [name for name in listed.stdout.decode().split() if ".checkpoint" in name]

    class Unhurried(WatchedVolume):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            super().read_into(offset, buffer)
            time.sleep(0.4)

    def kill_once_committed() -> None:
        wait_until(lambda: indexes() != before)
        kill()

    # The worker has taken some of what was read by then, late enough for a checkpoint to be due.
    before = indexes()
    volume = Unhurried(content(SIZE), at=50 * MIB, act=kill_once_committed)
    with pytest.raises(BlockferryError):
        store(repository, volume, WHOLE)
    assert repository.snapshots() == []
    assert len(checkpoints()) == 1
    place.run("list", "--consider-checkpoints", f"{place.location}::{checkpoints()[0]}")

    stored = store(repository, Volume(content(SIZE)), WHOLE)
    # Half of it compresses to nothing; a checkpoint has at least what one request brought.
    assert stored.bytes_stored < 0.5 * (SIZE - BATCH) + MIB
    assert repository.snapshots() == [stored.snapshot]
    assert checkpoints() == []
    assert place.extract(stored.snapshot.archive) == content(SIZE).tobytes()
    place.check()
    repository.delete([stored.snapshot])
    place.run("compact", place.location)
    assert sum(path.stat().st_size for path in Path(place.location, "data").rglob("*") if path.is_file()) < 10_000


def test_checkpoints_of_a_run_that_ends_well_leave_no_trace(place, open_repository, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG_CHECKPOINT", "1")
    repository = open_repository(place)

    class Unhurried(Volume):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            super().read_into(offset, buffer)
            time.sleep(0.5)

    stored = store(repository, Unhurried(content(SIZE)), WHOLE)
    listed = place.run("list", "--consider-checkpoints", "--short", place.location).stdout.decode().split()
    assert listed == [stored.snapshot.archive]
    place.check()
    repository.delete([stored.snapshot])
    place.run("compact", place.location)
    assert sum(path.stat().st_size for path in Path(place.location, "data").rglob("*") if path.is_file()) < 10_000
