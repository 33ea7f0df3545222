"""A filesystem that is mounted behind a guard: whole in what comes back, and frozen for no longer than it may be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster_files
from blockferry.cluster.epoch import HELD
from cluster_faults_support import ROUNDS, SLOW, THOROUGH, standing
from cluster_hosts_support import MIB, SharingHost, back_up, instant_of, sharing, wait_until
from cluster_support import RedisServer
from commands_support import new_depot, run
from conftest import Attach, Mount

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 60 * ROUNDS)]

CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


@pytest.fixture(params=["ext4", pytest.param("xfs", marks=pytest.mark.thorough)])
def filesystem(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def host(filesystem: str, tmp_path: Path, attach: Attach, redis: RedisServer) -> Iterator[SharingHost]:
    image = tmp_path / "volume.img"
    image.touch()
    os.truncate(image, {"ext4": 24, "xfs": 304}[filesystem] * MIB)
    run(f"mkfs.{filesystem}", "-q", image)
    with sharing(1, tmp_path, attach(image), redis.reference) as (made,):
        made.start()
        yield made


class Files:
    """A process that writes files, and what it wrote."""

    def __init__(self, place: Path, journal: Path) -> None:
        self.journal = journal
        self.process = subprocess.Popen([sys.executable, cluster_files.__file__, str(place), str(journal)])
        wait_until(lambda: len(self.writes()) > 20)

    def writes(self) -> list[cluster_files.FileWrite]:
        return cluster_files.writes_of(self.journal) if self.journal.exists() else []

    def longest(self) -> float:
        """Return the seconds that a write took at most."""
        return max(write.end - write.begin for write in self.writes()) / 1e9

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def files(host: SharingHost, tmp_path: Path, mount: Mount) -> Iterator[Files]:
    files = Files(mount(host.device), tmp_path / "journal")
    try:
        yield files
    finally:
        files.process.kill()
        files.process.wait()


def test_files_are_as_they_were_at_the_instant(
    filesystem: str, host: SharingHost, files: Files, tmp_path: Path, mount: Mount
):
    depot = new_depot("restic", tmp_path / "repository")
    longest = 0.0
    for number in range(ROUNDS):
        said = back_up(depot, host)
        assert said["bytes_logged"] > 0
        shown = depot.ferry("show", said["snapshot"], "--json").json()
        assert (shown["stability"], shown["tier"]) == ("frozen", "used")
        restored = tmp_path / f"restored-{number}.img"
        assert depot.ferry("restore", said["snapshot"], restored).code == 0
        if filesystem == "ext4":  # XFS always leaves something in its log, for mounting to replay
            run(*CHECK[filesystem], restored)
        place = mount(restored, *(["nouuid"] if filesystem == "xfs" else []))
        assert cluster_files.check(place, files.writes(), instant_of(depot, said["snapshot"])) > 5
        run("umount", place)
        run(*CHECK[filesystem], restored)
        longest = max(longest, said["seconds_held"])
    assert files.longest() < longest + 1
    assert files.end() == 0


@pytest.mark.parametrize("filesystem", ["ext4", pytest.param("xfs", marks=THOROUGH)], indirect=True)
def test_the_coordinator_is_killed_while_it_is_frozen(host: SharingHost, files: Files):
    with standing(host) as coordinator:
        coordinator.kill()
        before = len(files.writes())
        time.sleep(0.5)
        assert len(files.writes()) == before, "it was not frozen, this test tests nothing"
        wait_until(lambda: len(files.writes()) > before + 10, HELD + SLOW)
    assert HELD / 2 < files.longest() < HELD + SLOW
    assert files.end() == 0


@THOROUGH
def test_the_guard_is_killed_while_it_is_frozen(host: SharingHost, files: Files, tmp_path: Path):
    with standing(host):
        os.kill(host.guard_process(), signal.SIGKILL)
        # The disk is gone, as if it was unplugged; whoever writes learns that, and need not wait for ever.
        assert files.process.wait(HELD + SLOW) != 0
        # What watches over the freeze has the directory open until it is over.
        unmount = ["umount", str(tmp_path / "mounted-0")]
        wait_until(lambda: subprocess.run(unmount, timeout=HELD + SLOW, check=False).returncode == 0, HELD + SLOW)
    host.clear_away()
    run("mount", host.volume, tmp_path / "mounted-0")
    assert cluster_files.check(tmp_path / "mounted-0", files.writes(), time.time_ns()) > 5
