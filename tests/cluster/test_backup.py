"""Backups of a volume that several hosts write to at once: what comes back is one instant of it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster_load
from cluster_hosts_support import SharingHost, back_up, instant_of, sharing, writes_of
from cluster_support import running_redis
from commands_support import Depot

pytestmark = pytest.mark.root

ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_INSTANTS", "1"))


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path, volume: str) -> Iterator[list[SharingHost]]:
    """Hosts that share an index: one alone in a file, several in a Redis."""
    with contextlib.ExitStack() as running:
        index = f"sqlite://{tmp_path / 'index.sqlite'}"
        if request.param > 1:
            index = running.enter_context(running_redis()).reference
        yield running.enter_context(sharing(request.param, tmp_path, volume, index))


@pytest.mark.timeout(300 + 30 * ROUNDS)
@pytest.mark.parametrize(
    "hosts",
    [2, *(pytest.param(count, marks=pytest.mark.thorough) for count in (1, 3, 4))],
    indirect=True,
)
def test_what_comes_back_is_the_instant(depot: Depot, hosts: list[SharingHost], tmp_path: Path):
    before = Path(hosts[0].volume).read_bytes()
    locks = tmp_path / "locks"
    locks.touch()
    for number, host in enumerate(hosts):
        host.start()
        for each in range(2):
            host.start_load(locks, 10 * number + each + 1)
    for number in range(ROUNDS):
        time.sleep(random.uniform(0.1, 1))
        said = back_up(depot, hosts[number % len(hosts)])
        assert said["hosts"] == [host.name for host in hosts]
        assert said["bytes_logged"] > 0
        restored = tmp_path / "restored.img"
        assert depot.ferry("restore", said["snapshot"], restored).code == 0
        instant = instant_of(depot, said["snapshot"])
        under_way = cluster_load.check(restored.read_bytes(), before, writes_of(hosts), instant)
        assert under_way <= 2 * len(hosts) * cluster_load.MOST
        restored.unlink()
    assert all(code == 0 for host in hosts for code in host.stop_loads())
    depot.check()
