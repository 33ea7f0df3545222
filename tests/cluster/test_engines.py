"""Who copies the shares: processes of one host, or workers of several, of which one may die."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster_load
from cluster_dask_support import Scheduler, Workers
from cluster_hosts_support import MIB, VOLUME, SharingHost, instant_of, writes_of
from commands_support import Depot, new_depot

pytestmark = pytest.mark.root

SIZE = 48 * MIB


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    running = Scheduler(tmp_path / "scheduler")
    yield running
    running.end()


def back_up(depot: Depot, hosts: list[SharingHost], tmp_path: Path, *options: object) -> dict[str, object]:
    """Back up while both hosts write; assert that what comes back is the instant."""
    before = Path(hosts[0].volume).read_bytes()
    locks = tmp_path / "locks"
    locks.touch()
    for number, host in enumerate(hosts):
        host.start()
        host.start_load(locks, number + 1)
    words = ["cluster", "backup", hosts[0].volume, "--name", VOLUME, *options, "--json"]
    said = depot.ferry(*words, **hosts[0].env).json()
    restored = tmp_path / "restored.img"
    assert depot.ferry("restore", said["snapshot"], restored).code == 0
    cluster_load.check(restored.read_bytes(), before, writes_of(hosts), instant_of(depot, said["snapshot"]))
    assert all(code == 0 for host in hosts for code in host.stop_loads())
    return said


@pytest.mark.parametrize("depot", [pytest.param("borg", marks=pytest.mark.thorough), "restic"], indirect=True)
@pytest.mark.thorough
def test_processes_of_one_host_copy_a_share_each(depot: Depot, hosts: list[SharingHost], tmp_path: Path):
    assert back_up(depot, hosts, tmp_path, "--processes", "3")["shares"] == 3


@pytest.mark.thorough
def test_every_host_copies_a_share(depot: Depot, hosts: list[SharingHost], scheduler: Scheduler, tmp_path: Path):
    workers = Workers(depot, hosts, scheduler)
    try:
        assert back_up(depot, hosts, tmp_path, "--engine", scheduler.engine)["shares"] == 2
    finally:
        workers.end()


def test_a_worker_that_is_killed_leaves_its_share_to_the_other(
    hosts: list[SharingHost], scheduler: Scheduler, tmp_path: Path
):
    depot = new_depot("restic", tmp_path / "repository")
    workers = Workers(depot, hosts, scheduler)
    try:
        threading.Thread(target=_kill_when_it_copies, args=[workers.processes[1]], daemon=True).start()
        assert back_up(depot, hosts, tmp_path, "--engine", scheduler.engine)["shares"] == 2
        listed = depot.ferry("snapshots", "--json").json()["snapshots"]
        assert len(listed) == 1
    finally:
        workers.end()


@pytest.mark.parametrize("depot", ["restic"], indirect=True)
def test_a_scheduler_without_the_volume_is_refused(
    depot: Depot, hosts: list[SharingHost], scheduler: Scheduler, tmp_path: Path
):
    hosts[0].start()
    words = ["cluster", "backup", hosts[0].volume, "--name", VOLUME, "--engine"]
    depot.ferry(*words, scheduler.engine, **hosts[0].env).refused(2, "no worker has the volume", "cluster worker")
    depot.ferry(*words, "dask://tcp://127.0.0.1:1", **hosts[0].env).refused(2, "no Dask scheduler")
    depot.ferry(*words, "slurm", **hosts[0].env).refused(2, "not an engine")
    assert depot.archives() == []


def _kill_when_it_copies(worker: subprocess.Popen[str]) -> None:
    """Kill a worker half a second after it has started restic."""
    children = Path(f"/proc/{worker.pid}/task")
    while not any("restic" in _name(each) for path in children.glob("*/children") for each in path.read_text().split()):
        time.sleep(0.05)
    time.sleep(0.5)
    worker.kill()


def _name(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return ""
