"""Backups of a volume that several hosts write to at once: what comes back is one instant of it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cluster_load
from cluster_dask_support import copied_by_dask
from cluster_hosts_support import SharingHost, back_up, instant_of, sharing, writes_of
from cluster_support import running_redis
from commands_support import Depot, restic_first
from hot_hosts_support import hosts as namespaces

pytestmark = pytest.mark.root

ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_INSTANTS", "1"))
SEED = int(os.environ.get("BLOCKFERRY_TEST_SEED", "1"))


class Cluster(NamedTuple):
    """Hosts that share a volume, how their backups are made, and what is in the environment for that."""

    hosts: list[SharingHost]
    options: list[str]
    env: dict[str, str]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, depot: Depot, tmp_path: Path, volume: str) -> Iterator[Cluster]:
    """Hosts in network namespaces, and one more where Redis is and Dask's scheduler."""
    count, engine = request.param
    with contextlib.ExitStack() as running:
        server, *spaces = running.enter_context(namespaces(count, hidden=()))
        prefix = ["ip", "netns", "exec", server.name]
        settings = [f"bind {server.address}", "port 6379", "protected-mode no"]
        running.enter_context(running_redis(*settings, prefix=prefix))
        hosts = running.enter_context(sharing(count, tmp_path, volume, f"redis://{server.address}/0", spaces))
        if engine == "local":
            yield Cluster(hosts, [], {})
        else:
            dask = running.enter_context(copied_by_dask(depot, hosts, tmp_path, server.address, prefix))
            yield Cluster(hosts, ["--engine", dask.engine], dask.env)


@pytest.mark.timeout(300 + 60 * ROUNDS)
@pytest.mark.parametrize(
    ("depot", "cluster"),
    [
        pytest.param(
            tool,
            (count, engine),
            id=f"{tool}-{count}-{engine}",
            marks=[]
            if (tool, count, engine) in {("borg", 2, "local"), ("restic", 3, "dask")}
            else pytest.mark.thorough,
        )
        for tool in ("borg", "restic")
        for count in (2, 3, 4)
        for engine in ("local", "dask")
    ],
    indirect=True,
)
def test_what_comes_back_is_the_instant(depot: Depot, cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest):
    """Each round has other writes, by a seed of its own, and its instant somewhere among them."""
    hosts = cluster.hosts
    for host in hosts:
        host.start()
    for number in range(ROUNDS):
        chance = random.Random(f"{SEED} {request.node.name} {number}")
        before = Path(hosts[0].volume).read_bytes()
        writing(hosts, tmp_path, chance)
        time.sleep(chance.uniform(0.1, 1))
        said = back_up(depot, hosts[number % len(hosts)], *cluster.options, **cluster.env)
        assert said["hosts"] == [host.name for host in hosts]
        assert said["bytes_logged"] > 0
        restored = tmp_path / "restored.img"
        assert depot.ferry("restore", said["snapshot"], restored).code == 0
        instant = instant_of(depot, said["snapshot"])
        assert all(code == 0 for host in hosts for code in host.stop_loads())
        under_way = cluster_load.check(restored.read_bytes(), before, writes_of(hosts), instant)
        assert under_way <= 2 * len(hosts) * cluster_load.MOST
        restored.unlink()
    depot.check()


@restic_first
def test_one_host_alone_needs_no_server(depot: Depot, volume: str, tmp_path: Path):
    before = Path(volume).read_bytes()
    with sharing(1, tmp_path, volume, f"sqlite://{tmp_path / 'index.sqlite'}") as hosts:
        hosts[0].start()
        writing(hosts, tmp_path, random.Random(SEED))
        said = back_up(depot, hosts[0])
        restored = tmp_path / "restored.img"
        assert depot.ferry("restore", said["snapshot"], restored).code == 0
        assert all(code == 0 for code in hosts[0].stop_loads())
        cluster_load.check(restored.read_bytes(), before, writes_of(hosts), instant_of(depot, said["snapshot"]))


def writing(hosts: list[SharingHost], home: Path, chance: random.Random) -> None:
    """Have two processes of each host write, whose journals begin anew."""
    locks = home / "locks"
    locks.touch()
    for host in hosts:
        for journal in host.journals():
            journal.unlink()
        for _ in range(2):
            host.start_load(locks, chance.randrange(1 << 31))
