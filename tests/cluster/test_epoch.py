"""The stages of an epoch, in one process: who waits for what."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.cluster import coordinator, epoch, shared_device
from blockferry.cluster.coordinator import coordinated
from blockferry.cluster.guard import Guard, Logged
from blockferry.cluster.index import LogIndex
from blockferry.cluster.member import Member
from blockferry.cluster.users_device import UsersDevice
from blockferry.errors import EpochError
from blockferry.volume import Volume
from cluster_faults_support import SLOW
from cluster_hosts_support import MIB, VOLUME
from cluster_support import open_index

pytestmark = pytest.mark.root

SIZE = 4 * MIB
ALONE = "alone"
HELD = 1.0


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LogIndex]:
    with contextlib.closing(open_index(f"sqlite://{tmp_path / 'index.sqlite'}")) as opened:
        yield opened


@pytest.fixture
def guard(volume: str, index: LogIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """A guard whose writes are held for a second at most."""
    monkeypatch.setattr(epoch, "HELD", HELD)
    monkeypatch.setattr(coordinator, "_PATIENCE_TO_HOLD", HELD * 0.8)
    with shared_device.opened(Volume.discover(volume)) as device:
        logged = Logged(device)
        guard = Guard(logged, logged)
        about = {"volume": VOLUME, "host": ALONE, "size": SIZE}
        member = Member(guard, device, index, about, tmp_path / "log")
        member.start(late=False)
        member.serve(UsersDevice(volume))
        try:
            yield guard
        finally:
            member.stop()


def is_slow(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have the first sync of a guard take longer than writes may be held; return what tells that it began."""
    began, sync = threading.Event(), guard.sync

    def slow() -> None:
        if not began.is_set():
            began.set()
            time.sleep(HELD * 1.5)
        sync()

    monkeypatch.setattr(guard, "sync", slow)
    return began


def test_nobody_waits_for_what_takes_long_to_write_out(
    guard: Guard, index: LogIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing_out = is_slow(guard, monkeypatch)
    waited = []

    def write() -> None:
        assert writing_out.wait(5)
        began = time.monotonic()
        guard.write(0, memoryview(bytes(4096)))
        waited.append(time.monotonic() - began)

    writer = threading.Thread(target=write)
    writer.start()
    with coordinated(index, VOLUME, SIZE, [ALONE]) as begun:
        writer.join()
        begun.hold()
        begun.open()
        assert time.monotonic() - begun.began < HELD
        begun.seal()
    assert waited[0] < HELD


@pytest.mark.parametrize(
    ("said", "missing"), [({"state": "quiet"}, "held"), ({"state": "ready", "frozen": ["/srv"]}, "quiet")]
)
def test_a_host_that_is_not_ready_while_users_wait_is_named(
    guard: Guard, index: LogIndex, said: dict[str, object], missing: str
) -> None:
    with coordinated(index, VOLUME, SIZE, []) as begun:
        index.put(epoch.host_key(VOLUME, "another"), {})
        index.put(epoch.report_key(begun.epoch.id, "another"), said)
        with pytest.raises(EpochError, match=rf"another: did not report `{missing}`"):
            begun.hold()
        assert time.monotonic() - begun.began < HELD + SLOW
    guard.write(0, memoryview(bytes(4096)))
