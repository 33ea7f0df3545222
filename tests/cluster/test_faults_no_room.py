"""What is full or locked during a backup of a shared volume: nothing looks complete, and the hosts' writes go on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockferry.cluster.epoch import HEARD_OF, Report
from blockferry.cluster.index import LogIndex
from cluster_faults_support import ROUNDS, THOROUGH, Trouble, wait_for_report
from cluster_hosts_support import MIB, VOLUME, SharingHost, wait_until
from cluster_support import RedisServer
from commands_support import Depot, locked, new_depot, run
from conftest import Attach, Mount

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 60 * ROUNDS)]

SIZE = 12 * MIB
Small = Callable[[int], Path]


@pytest.fixture
def small(tmp_path: Path, attach: Attach, mount: Mount) -> Small:
    """Return a function that makes a filesystem of so many MiB."""

    def make(size: int) -> Path:
        image = tmp_path / "small.img"
        image.touch()
        os.truncate(image, size * MIB)
        run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
        return mount(attach(image))

    return make


def full(place: Path) -> Path:
    """Leave no room in a filesystem; return the file to be removed to have some again."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return new_depot("restic", tmp_path / "repository")


@pytest.mark.parametrize("whose", [pytest.param(0, marks=THOROUGH), 1])
def test_a_host_has_no_room_for_its_log(
    whose: int, depot: Depot, hosts: list[SharingHost], tmp_path: Path, small: Small
):
    place = small(6)
    host = hosts[whose] = dataclasses.replace(hosts[whose], state=place)
    try:
        trouble = Trouble(depot, hosts, tmp_path)
        ballast = full(place)
        for _ in range(ROUNDS):
            done = trouble.back_up_while(lambda: None)
            assert trouble.check(done) is False
            assert f"{host.name}: {place}" in done.stderr
            assert "No space left" in done.stderr
        ballast.unlink()
        trouble.the_hosts_went_on()
        trouble.one_more_is_right()
    finally:
        host.clear_away()


@THOROUGH
def test_the_host_that_backs_up_has_no_room_for_all_logs(
    depot: Depot, hosts: list[SharingHost], tmp_path: Path, small: Small
):
    place = small(6)
    full(place)
    trouble = Trouble(depot, hosts, tmp_path)
    done = trouble.back_up_while(lambda: None, BLOCKFERRY_STATE_DIR=str(place))
    assert trouble.check(done) is False
    assert "No space left" in done.stderr
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


@pytest.mark.parametrize("tool", ["borg", pytest.param("restic", marks=pytest.mark.thorough)])
def test_the_repository_is_locked(tool: str, hosts: list[SharingHost], tmp_path: Path):
    depot = new_depot(tool, tmp_path / "repository")
    trouble = Trouble(depot, hosts[:1], tmp_path)
    with locked(depot):
        done = trouble.back_up_while(lambda: None)
        assert (done.returncode, "Traceback" in done.stderr) == (75, False)
        assert "lock" in done.stderr
    assert trouble.check(done) is False
    assert len(depot.archives()) == {"borg": 0, "restic": 1}[tool]  # the lock's own
    trouble.the_hosts_went_on()


@THOROUGH
@pytest.mark.parametrize("tool", ["borg", "restic"])
def test_the_repository_is_full(tool: str, hosts: list[SharingHost], tmp_path: Path, small: Small):
    place = small(6)
    depot = new_depot(tool, place / "repository")
    trouble = Trouble(depot, hosts[:1], tmp_path)
    done = trouble.back_up_while(lambda: None)
    assert trouble.check(done) is False
    assert any(word in done.stderr.lower() for word in ("no space left", "disk is full")), done.stderr
    trouble.the_hosts_went_on()


def test_the_index_is_full_from_the_beginning(
    depot: Depot, hosts: list[SharingHost], redis: RedisServer, index: LogIndex, tmp_path: Path
):
    trouble = Trouble(depot, hosts[:1], tmp_path)
    words = ["cluster", "backup", hosts[0].volume, "--name", VOLUME]
    redis.ask("CONFIG", "SET", "maxmemory", "1000")
    depot.ferry(*words, **hosts[0].env).refused(1, "is full", "maxmemory")
    # By and by it forgets the guards too, whose word cannot be renewed.
    index.remove(f"volumes/{VOLUME}/hosts/")
    depot.ferry(*words, **hosts[0].env).refused(1, "is full", "maxmemory")
    wait_until(lambda: "is full" in hosts[0].status()["failure"], HEARD_OF)  # when it renews its word
    redis.ask("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: hosts[0].status()["failure"] == "", HEARD_OF)
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


@THOROUGH
@pytest.mark.parametrize("report", [Report.HELD, Report.LOGGING])
def test_the_index_is_full_in_the_middle(
    report: Report, depot: Depot, hosts: list[SharingHost], redis: RedisServer, index: LogIndex, tmp_path: Path
):
    trouble = Trouble(depot, hosts, tmp_path)

    def fill() -> None:
        wait_for_report(index, hosts[1], report)
        redis.ask("CONFIG", "SET", "maxmemory", "1000")

    for _ in range(ROUNDS):
        done = trouble.back_up_while(fill)
        assert trouble.check(done) is False
        assert "is full" in done.stderr
        redis.ask("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: not any(host.status()["failure"] for host in hosts), HEARD_OF)
    trouble.the_hosts_went_on()
    wait_until(lambda: index.get(f"volumes/{VOLUME}/epoch") is None, HEARD_OF + 1)
    trouble.one_more_is_right()
