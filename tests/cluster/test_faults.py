"""Whatever fails during a backup of a shared volume: it is right, or void and says so; the hosts' writes go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cluster_load
from cluster.test_backup import SIZE, back_up, instant_of, writes_of
from cluster_hosts_support import VOLUME, SharingHost, sharing, wait_until
from cluster_support import RedisServer, running_redis
from commands_support import Depot, blockferry, command, new_depot, run
from conftest import Attach
from hot_hosts_support import Host
from hot_hosts_support import hosts as namespaces

THOROUGH = pytest.mark.thorough
ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_FAULTS", "1"))
pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 60 * ROUNDS)]
LONGEST = 12.0
"""Seconds that a write may ever take: until a host lets go, and what an index that is silent costs beside."""


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return new_depot("restic", tmp_path / "repository")


@pytest.fixture
def volume(tmp_path: Path, attach: Attach) -> str:
    image = tmp_path / "volume.img"
    image.write_bytes(random.Random(5).randbytes(SIZE))
    return attach(image)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def hosts(tmp_path: Path, volume: str, redis: RedisServer) -> Iterator[list[SharingHost]]:
    with sharing(3, tmp_path, volume, redis.reference) as made:
        yield made


class Trouble:
    """Three hosts that write to a volume, and backups of it during which something fails."""

    def __init__(self, depot: Depot, hosts: list[SharingHost], home: Path) -> None:
        self.depot, self.hosts, self.home = depot, hosts, home
        self.before = Path(hosts[0].volume).read_bytes()
        self.chance = random.Random(int(os.environ.get("BLOCKFERRY_TEST_SEED", "1")))
        self.locks = home / "locks"
        self.locks.touch()
        self.seed = 0
        for host in hosts:
            self.start(host)

    def start(self, host: SharingHost) -> None:
        """Start a host's guard, and two processes that write."""
        host.start()
        for _ in range(2):
            self.seed += 1
            host.start_load(self.locks, self.seed)

    def back_up_while(self, what: Callable[[], None], after: float, **env: str) -> subprocess.CompletedProcess[str]:
        """Back the volume up from the first host; `what` fails so many seconds after the beginning."""
        host = self.hosts[0]
        words = ["cluster", "backup", host.volume, "--name", VOLUME, "--repo", self.depot.reference, "--json"]
        process = subprocess.Popen(
            command(*words),
            env=os.environ | host.env | self.depot.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.process = process
        failing = threading.Timer(after, what)
        failing.start()
        out, err = process.communicate(timeout=120)
        failing.join()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def check(self, done: subprocess.CompletedProcess[str]) -> bool:
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

    def the_hosts_went_on(self, *but: SharingHost) -> None:
        """Assert that all hosts wrote all the time, that nothing of it is lost, and that the next backup is right."""
        for host in self.hosts:
            ended = host.stop_loads()
            assert host in but or ended == [0, 0], (host.name, ended)
            assert host in but or not host.status()["held"]
        for write in writes_of(self.hosts):
            assert write.end - write.begin < LONGEST * 1e9, write
        with open(self.hosts[0].volume, "rb", buffering=0) as disk:
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cluster_load.check(disk.read(), self.before, writes_of(self.hosts), time.time_ns())

    def one_more_is_right(self) -> None:
        said = back_up(self.depot, self.hosts[0])
        assert said["hosts"] == [host.name for host in self.hosts]
        assert self.depot.ferry("verify", said["snapshot"], "--against", self.hosts[0].volume).code == 0


@pytest.mark.parametrize(
    "moment", [pytest.param("begin", marks=THOROUGH), "middle", pytest.param("any", marks=THOROUGH)]
)
def test_a_host_is_killed(moment: str, depot: Depot, hosts: list[SharingHost], tmp_path: Path):
    trouble = Trouble(depot, hosts, tmp_path)
    victim = hosts[1]
    for _ in range(ROUNDS):
        after = {"begin": 0.0, "middle": 1.5, "any": trouble.chance.uniform(0, 4)}[moment]
        done = trouble.back_up_while(lambda: os.kill(victim.guard_process(), signal.SIGKILL), after)
        there = trouble.check(done)
        assert there or any(word in done.stderr for word in (victim.name, "another backup")), done.stderr
        trouble.the_hosts_went_on(victim)
        victim.stop("--force")
        for host in hosts:
            if host is victim:
                trouble.start(host)
            else:
                for _each in range(2):
                    trouble.seed += 1
                    host.start_load(trouble.locks, trouble.seed)
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


@pytest.mark.parametrize(
    "fault",
    ["killed", pytest.param("restarted", marks=THOROUGH), pytest.param("stopped", marks=THOROUGH), "full"],
)
def test_the_index_fails(fault: str, depot: Depot, hosts: list[SharingHost], redis: RedisServer, tmp_path: Path):
    trouble = Trouble(depot, hosts, tmp_path)

    def fail() -> None:
        if fault == "killed":
            redis.kill()
        elif fault == "restarted":
            redis.restart()
        elif fault == "stopped":
            with redis.stopped():
                time.sleep(4)
        else:
            redis.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            redis.ask("CONFIG", "SET", "maxmemory", "1000")

    for _ in range(ROUNDS):
        done = trouble.back_up_while(fail, trouble.chance.uniform(0.5, 2))
        trouble.check(done)
        if fault == "killed":
            redis.start()
        elif fault == "full":
            redis.ask("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: len(hosts[0].ferry("cluster", "hosts", VOLUME, "--json").json()["hosts"]) == len(hosts))
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


def test_the_coordinator_is_killed(depot: Depot, hosts: list[SharingHost], tmp_path: Path):
    trouble = Trouble(depot, hosts, tmp_path)
    for _ in range(ROUNDS):
        done = trouble.back_up_while(lambda: trouble.process.kill(), trouble.chance.uniform(0.5, 3))
        trouble.check(done)
    wait_until(lambda: all(not host.status()["epoch"] for host in hosts))
    trouble.the_hosts_went_on()
    time.sleep(10)  # until nothing is heard of it any more
    trouble.one_more_is_right()


@THOROUGH
def test_the_repository_is_full(depot: Depot, hosts: list[SharingHost], tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=400k", "none", small)
    try:
        depot = new_depot("restic", small / "repository")
        trouble = Trouble(depot, hosts, tmp_path)
        done = trouble.back_up_while(lambda: None, 0)
        assert done.returncode
        assert "Traceback" not in done.stderr
        trouble.the_hosts_went_on()
    finally:
        run("umount", "--lazy", small)


def test_one_host_is_cut_off(depot: Depot, tmp_path: Path, volume: str):
    with namespaces(3, hidden=()) as (server, *spaces):
        settings = [f"bind {server.address}", "port 6379", "protected-mode no"]
        with (
            running_redis(*settings, prefix=["ip", "netns", "exec", server.name]),
            sharing(3, tmp_path, volume, f"redis://{server.address}/0", spaces) as hosts,
        ):
            trouble = Trouble(depot, hosts, tmp_path)
            trouble.hosts = hosts[1:] + hosts[:1]  # who coordinates is not cut off
            done = _from(hosts[1], trouble, lambda: _cut(spaces[0], "down"), 1.5)
            assert trouble.check(done) is False
            assert hosts[0].name in done.stderr
            _cut(spaces[0], "up")
            wait_until(lambda: len(hosts[1].ferry("cluster", "hosts", VOLUME, "--json").json()["hosts"]) == 3)
            trouble.the_hosts_went_on()


def _cut(space: Host, state: str) -> None:
    run("ip", "-n", space.name, "link", "set", "wire", state)
    if state == "up":
        gateway = ".".join([*space.address.split(".")[:3], "1"])
        run("ip", "-n", space.name, "route", "add", "10.99.255.1/32", "via", gateway)


def _from(
    host: SharingHost, trouble: Trouble, what: Callable[[], None], after: float
) -> subprocess.CompletedProcess[str]:
    """Back up from a host's own namespace."""
    failing = threading.Timer(after, what)
    failing.start()
    words = ["cluster", "backup", host.volume, "--name", VOLUME, "--repo", trouble.depot.reference, "--json"]
    done = blockferry(*words, env=host.env | trouble.depot.env, prefix=host.prefix)
    failing.join()
    return subprocess.CompletedProcess(words, done.code, done.out, done.err)
