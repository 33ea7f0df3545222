"""Whatever fails during a backup of a shared volume: it is right, or void and says so; the hosts' writes go on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_faults_support import ROUNDS, THOROUGH, Ended, Trouble
from cluster_hosts_support import VOLUME, SharingHost, sharing, wait_until
from cluster_support import RedisServer, running_redis
from commands_support import Depot, blockferry, new_depot, run
from hot_hosts_support import Host
from hot_hosts_support import hosts as namespaces

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 60 * ROUNDS)]


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return new_depot("restic", tmp_path / "repository")


@pytest.fixture
def hosts(tmp_path: Path, volume: str, redis: RedisServer) -> Iterator[list[SharingHost]]:
    with sharing(3, tmp_path, volume, redis.reference) as made:
        yield made


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
        trouble.load_again()
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


@pytest.mark.parametrize(
    "fault",
    [
        "killed",
        pytest.param("restarted", marks=THOROUGH),
        pytest.param("stopped", marks=THOROUGH),
        pytest.param("full", marks=THOROUGH),
    ],
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


@pytest.mark.thorough
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


def _from(host: SharingHost, trouble: Trouble, what: Callable[[], None], after: float) -> Ended:
    """Back up from a host's own namespace."""
    failing = threading.Timer(after, what)
    failing.start()
    words = ["cluster", "backup", host.volume, "--name", VOLUME, "--repo", trouble.depot.reference, "--json"]
    done = blockferry(*words, env=host.env | trouble.depot.env, prefix=host.prefix)
    failing.join()
    return subprocess.CompletedProcess(words, done.code, done.out, done.err)
