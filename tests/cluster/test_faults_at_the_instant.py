"""What fails just when all hosts hold their writes: they go on within the bound, and what is there is right."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from blockferry.cluster.epoch import HELD, Report, epoch_key
from blockferry.cluster.index import LogIndex
from cluster_faults_support import ROUNDS, SLOW, THOROUGH, Trouble, standing, wait_for_report
from cluster_hosts_support import MIB, VOLUME, SharingHost, wait_until
from cluster_support import RedisServer
from commands_support import new_depot

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 60 * ROUNDS)]

SIZE = 12 * MIB


@pytest.fixture
def trouble(tmp_path: Path, hosts: list[SharingHost]) -> Trouble:
    return Trouble(new_depot("restic", tmp_path / "repository"), hosts, tmp_path)


@pytest.mark.parametrize(
    "report", [pytest.param(Report.QUIET, marks=THOROUGH), Report.HELD, pytest.param(Report.LOGGING, marks=THOROUGH)]
)
def test_a_host_is_killed_at_the_instant(report: Report, trouble: Trouble, index: LogIndex):
    victim = trouble.hosts[1]

    def kill() -> None:
        wait_for_report(index, victim, report)
        time.sleep(delay)
        os.kill(guard, signal.SIGKILL)

    for number in range(ROUNDS):
        guard = victim.guard_process()
        delay = trouble.chance.uniform(0, 0.05) if number else 0
        done = trouble.back_up_while(kill)
        assert trouble.check(done) is False
        assert victim.name in done.stderr
        trouble.the_hosts_went_on(victim)
        victim.stop("--force")
        trouble.load_again()
    trouble.the_hosts_went_on()
    trouble.one_more_is_right()


@THOROUGH
@pytest.mark.parametrize("stands", [False, True])
def test_the_coordinator_is_killed_while_hosts_hold_their_writes(stands: bool, trouble: Trouble):
    first = trouble.hosts[0]
    with standing(first) as coordinator:
        if not stands:
            coordinator.kill()
        words = ["cluster", "backup", first.volume, "--name", VOLUME]
        trouble.depot.ferry(*words, **first.env).refused(75, "another backup", "Try again")
        wait_until(lambda: not any(host.status()["held"] for host in trouble.hosts), HELD + SLOW)
    assert HELD / 2 < trouble.the_hosts_went_on() < HELD + SLOW
    assert trouble.depot.archives() == []


@THOROUGH
@pytest.mark.parametrize("report", [Report.HELD, Report.LOGGING])
def test_the_index_hangs_for_longer_than_writes_are_held(
    report: Report, trouble: Trouble, index: LogIndex, redis: RedisServer
):
    def hang() -> None:
        wait_for_report(index, trouble.hosts[0], report)
        with redis.stopped():
            time.sleep(HELD + 1)

    for _ in range(ROUNDS):
        done = trouble.back_up_while(hang)
        assert trouble.check(done) is False
        assert "did not answer" in done.stderr
        wait_until(lambda: index.get(epoch_key(VOLUME)) is None)  # it cannot be taken out while the index hangs
    trouble.the_hosts_went_on()
    wait_until(lambda: trouble.hosts[0].status()["failure"] == "")
