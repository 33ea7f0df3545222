"""What the journal and the service manager are told of a run; the journal is a real one, apart from the machine's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockferry import service
from commands_support import Depot, blockferry, command, new_depot, run

JOURNALD = Path("/lib/systemd/systemd-journald")
APART = f"""\
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal "/run/log/journal/$(cat /etc/machine-id)"
{JOURNALD} >&2 & journald=$!
until test -S /run/systemd/journal/socket -a -S /run/systemd/journal/stdout; do sleep 0.05; done
systemd-cat sh -c 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@"' sh "$@" || true
journalctl --directory=/run/log/journal --sync >/dev/null 2>&1 || sleep 0.5
journalctl --directory=/run/log/journal --output=json --all --no-pager
kill $journald
"""


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Depot:
    return new_depot("restic", tmp_path_factory.mktemp("depot") / "repository")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "vm.img"
    run("truncate", "-s", "32M", path)
    run("mke2fs", "-q", "-F", "-t", "ext4", path)
    return path


def in_the_journal(depot: Depot, *words: object) -> list[dict[str, Any]]:
    """Run a command as systemd does; return what a journal of its own has of it."""
    if not JOURNALD.exists():
        pytest.skip("systemd-journald is not installed: apt install systemd")
    script = ["unshare", "--mount", "--propagation=private", "sh", "-ec", APART, "sh", *command(*words)]
    done = subprocess.run(script, env=os.environ | depot.env, capture_output=True, text=True, timeout=120, check=False)
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [each for each in entries if each.get("SYSLOG_IDENTIFIER") == "blockferry"]
    assert ours, (done.stdout, done.stderr)
    return ours


@pytest.mark.root
def test_a_backup_can_be_found_by_its_volume_and_has_its_figures(depot: Depot, image: Path) -> None:
    entries = in_the_journal(depot, "backup", image, "--repo", depot.reference)
    stored = depot.ferry("snapshots", "--json").json()["snapshots"][-1]
    result = entries[-1]
    assert {each["BLOCKFERRY_VOLUME"] for each in entries} == {"vm.img"}
    assert result["MESSAGE"].startswith(f"snapshot {stored['id']} of vm.img")
    assert result["BLOCKFERRY_TIER"] == "used"
    assert int(result["BLOCKFERRY_BYTES_VOLUME"]) == 32 << 20
    assert result["BLOCKFERRY_REPOSITORY"] == depot.reference
    lines = [each for each in entries if each["MESSAGE"].endswith("says ext4 bitmaps")]
    assert [(each["BLOCKFERRY_SNAPSHOT"], each["PRIORITY"]) for each in lines] == [(stored["id"], "6")]
    assert not [each for each in entries if "BLOCKFERRY_SHARES" in each]


@pytest.mark.root
def test_a_failure_has_its_priority_and_exit_code_and_no_secret(depot: Depot, image: Path) -> None:
    wrong = Depot(depot.tool, depot.path, {"RESTIC_PASSWORD": "sesame"})
    *_others, error = in_the_journal(wrong, "backup", image, "--repo", depot.reference)
    assert (error["PRIORITY"], error["BLOCKFERRY_EXIT_CODE"], error["BLOCKFERRY_VOLUME"]) == ("3", "1", "vm.img")
    assert error["BLOCKFERRY_REMEDY"] in error["MESSAGE"]
    assert "sesame" not in json.dumps(_others + [error])


@pytest.mark.parametrize("stream", ["", "1:1"])
def test_away_from_systemd_nothing_changes(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    done = blockferry("show", "nothing", "--repo", "nosuch:tool")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("blockferry: nosuch:tool")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What the service manager is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def all_of(told: socket.socket) -> list[str]:
    told.setblocking(False)
    found = []
    while True:
        try:
            found.append(told.recv(4096).decode())
        except BlockingIOError:
            return found


def test_the_status_of_a_backup_says_how_far_it_is(depot: Depot, image: Path, told: socket.socket) -> None:
    depot.ferry("backup", image, "--json").json()
    assert [each for each in all_of(told) if each.startswith("STATUS=backup: 100 %, ")]


@pytest.mark.root
def test_a_hot_restore_is_ready_says_how_far_it_is_and_stops(
    depot: Depot, image: Path, told: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    depot.ferry("backup", image, "--json").json()
    all_of(told)
    told.settimeout(60)
    words = command("attach", "latest", tmp_path / "hot.img", "--repo", depot.reference, "--foreground")
    unit = subprocess.Popen(words, env=os.environ | depot.env)
    assert told.recv(100) == b"READY=1"
    assert b" % there" in told.recv(100)
    unit.send_signal(signal.SIGTERM)
    assert unit.wait(60) == 0
    assert "STOPPING=1" in all_of(told)


def test_a_process_that_outlives_its_unit_does_not_speak_for_it(told: socket.socket, tmp_path: Path) -> None:
    place, seen = tmp_path / "some.socket", tmp_path / "seen"
    script = f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))"
    with pytest.raises(Exception, match="did not start"):
        service.start(["-c", script], place, name="some")
    assert "NOTIFY_SOCKET" not in seen.read_text().split()
    assert all_of(told) == []
