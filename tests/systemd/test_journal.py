"""What the journal and the service manager are told of a run; the journal is a real one, apart from the machine's."""

from __future__ import annotations

import json
import os
import re
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
journalctl() {{ command journalctl --directory=/run/log/journal --no-pager "$@"; }}
echo "--"
eval "$QUERIES"
kill $journald
"""
PAGE = Path(__file__).parents[2] / "docs" / "systemd.md"


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Depot:
    return new_depot("restic", tmp_path_factory.mktemp("depot") / "repository")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "vm.img"
    run("truncate", "-s", "32M", path)
    run("mke2fs", "-q", "-F", "-t", "ext4", path)
    return path


def in_the_journal(depot: Depot, *words: object, queries: str = "") -> tuple[list[dict[str, Any]], str]:
    """Run a command as systemd does; return what a journal of its own has of it, and the answer to other queries."""
    if not JOURNALD.exists():
        pytest.skip("systemd-journald is not installed: apt install systemd")
    script = ["unshare", "--mount", "--propagation=private", "sh", "-ec", APART, "sh", *command(*words)]
    done = subprocess.run(
        script,
        env=os.environ | depot.env | {"QUERIES": queries},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, _, answers = done.stdout.partition("--\n")
    entries = [json.loads(line) for line in whole.splitlines()]
    ours = [each for each in entries if each.get("SYSLOG_IDENTIFIER") == "blockferry"]
    assert ours, (done.stdout, done.stderr)
    return ours, answers


@pytest.mark.root
def test_a_backup_can_be_found_by_its_volume_and_has_its_figures(depot: Depot, image: Path) -> None:
    queries = "\n".join(re.findall(r"^journalctl .*", PAGE.read_text(), re.MULTILINE)).replace("=home ", "=vm.img ")
    words = ("backup", image, "--repo", depot.reference)
    entries, answers = in_the_journal(depot, *words, queries=queries)
    stored = depot.ferry("snapshots", "--json").json()["snapshots"][-1]
    result = entries[-1]
    assert {each["BLOCKFERRY_VOLUME"] for each in entries} == {"vm.img"}
    assert result["MESSAGE"].startswith(f"snapshot {stored['id']} of vm.img")
    assert result["BLOCKFERRY_TIER"] == "used"
    assert int(result["BLOCKFERRY_BYTES_VOLUME"]) == 32 << 20
    assert result["BLOCKFERRY_REPOSITORY"] == depot.reference
    lines = [each for each in entries if each["MESSAGE"].endswith("says ext4 bitmaps")]
    assert [(each["BLOCKFERRY_SNAPSHOT"], each["PRIORITY"]) for each in lines] == [(stored["id"], "6")]
    as_on_the_page = [json.loads(line) for line in answers.splitlines() if line.startswith("{")]
    assert as_on_the_page[-1]["BLOCKFERRY_BYTES_STORED"] == result["BLOCKFERRY_BYTES_STORED"]
    assert {each["BLOCKFERRY_SNAPSHOT"] for each in as_on_the_page if "BLOCKFERRY_TIER" in each} == {stored["id"]}


@pytest.mark.root
def test_a_failure_has_its_priority_and_exit_code_and_no_secret(depot: Depot, image: Path) -> None:
    wrong = Depot(depot.tool, depot.path, {"RESTIC_PASSWORD": "sesame"})
    (*_others, error), _none = in_the_journal(wrong, "backup", image, "--repo", depot.reference)
    assert (error["PRIORITY"], error["BLOCKFERRY_EXIT_CODE"], error["BLOCKFERRY_VOLUME"]) == ("3", "1", "vm.img")
    assert error["BLOCKFERRY_REMEDY"] in error["MESSAGE"]
    assert "sesame" not in json.dumps([*_others, error])


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


def test_a_process_that_outlives_its_unit_does_not_speak_for_it(told: socket.socket, tmp_path: Path) -> None:
    place, seen = tmp_path / "some.socket", tmp_path / "seen"
    script = f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))"
    with pytest.raises(Exception, match="did not start"):
        service.start(["-c", script], place, name="some")
    assert "NOTIFY_SOCKET" not in seen.read_text().split()
    assert all_of(told) == []
