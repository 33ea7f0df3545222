"""Hosts that write to a shared volume while backups of it fail; and what has to be true afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cluster_coordinator
import cluster_load
from blockferry.cluster import epoch
from blockferry.cluster.coordinator import progress_of
from blockferry.cluster.epoch import Report
from blockferry.cluster.index import PATIENCE, LogIndex
from blockferry.volume import file_size
from cluster_hosts_support import VOLUME, SharingHost, back_up, instant_of, writes_of
from commands_support import Depot, command

THOROUGH = pytest.mark.thorough
ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_FAULTS", "1"))
SEED = int(os.environ.get("BLOCKFERRY_TEST_SEED", "1"))
SLOW = 3.0
"""Seconds that a machine may take for what takes no time."""
LONGEST = epoch.HELD + PATIENCE + SLOW
"""Seconds that a write may ever take: until a host lets go, and what an index that is silent costs beside."""

Ended = subprocess.CompletedProcess[str]


class Trouble:
    """Hosts that write to a volume, and backups of it during which something fails."""

    def __init__(self, depot: Depot, hosts: list[SharingHost], home: Path) -> None:
        self.depot, self.hosts, self.home = depot, hosts, home
        self.before = Path(hosts[0].volume).read_bytes()
        self.chance = random.Random(SEED)
        self.locks = home / "locks"
        self.locks.touch()
        self.seed = 0
        for host in hosts:
            host.start()
        for host in hosts:
            self.load(host)

    def load(self, host: SharingHost) -> None:
        """Start two processes of a host that write."""
        for _ in range(2):
            self.seed += 1
            host.start_load(self.locks, self.seed)

    def load_again(self) -> None:
        """Start those that write, on every host whose load was ended, and the guards that do not run."""
        for host in self.hosts:
            if not host.loads:
                host.start()
                self.load(host)

    def back_up_while(self, what: Callable[[], None], after: float = 0, **env: str) -> Ended:
        """Back the volume up from the first host; `what` fails so many seconds after the beginning."""
        host = self.hosts[0]
        words = ["cluster", "backup", host.volume, "--name", VOLUME, "--repo", self.depot.reference, "--json"]
        self.process = subprocess.Popen(
            command(*words),
            env=os.environ | host.env | self.depot.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        failing = threading.Timer(after, what)
        failing.start()
        out, err = self.process.communicate(timeout=120)
        failing.join()
        return subprocess.CompletedProcess(words, self.process.returncode, out, err)

    def check(self, done: Ended) -> bool:
        """Assert that what a backup left is right, or nothing; return whether it is there."""
        assert "Traceback" not in done.stderr, done.stderr
        listed = self.depot.ferry("snapshots", "--json").json()["snapshots"]
        if done.returncode:
            assert listed == []
            return False
        (snapshot,) = listed
        restored = self.home / "restored.img"
        assert self.depot.ferry("restore", snapshot["id"], restored).code == 0
        instant = instant_of(self.depot, snapshot["id"])
        cluster_load.check(restored.read_bytes(), self.before, writes_of(self.hosts), instant)
        restored.unlink()
        assert self.depot.ferry("delete", snapshot["id"]).code == 0
        return True

    def the_hosts_went_on(self, *but: SharingHost) -> float:
        """Assert that all hosts wrote all the time, and that nothing of it is lost; return how long one waited."""
        for host in self.hosts:
            ended = host.stop_loads()
            assert host in but or not any(ended), (host.name, ended)
            assert host in but or not host.status()["held"]
        writes = writes_of(self.hosts)
        longest = max(write.end - write.begin for write in writes if write.end != cluster_load.NEVER) / 1e9
        assert longest < LONGEST
        with open(self.hosts[0].volume, "rb", buffering=0) as disk:
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cluster_load.check(disk.read(), self.before, writes, time.time_ns())
        return longest

    def one_more_is_right(self) -> None:
        said = back_up(self.depot, self.hosts[0])
        assert said["hosts"] == [host.name for host in self.hosts]
        assert self.depot.ferry("verify", said["snapshot"], "--against", self.hosts[0].volume).code == 0


def wait_for_report(index: LogIndex, host: SharingHost, report: Report, seconds: float = 30) -> None:
    """Return as soon as a host has reported so much."""
    deadline = time.monotonic() + seconds
    while progress_of(index, VOLUME)[1].get(host.name, {}).get("state") != report:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextlib.contextmanager
def standing(host: SharingHost) -> Iterator[subprocess.Popen[bytes]]:
    """Give a coordinator that has all hosts hold their writes, and does nothing more."""
    words = [sys.executable, cluster_coordinator.__file__, host.index, VOLUME, str(file_size(host.volume))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
