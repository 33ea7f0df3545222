"""The lines for cron do on a real cron what the pages say, but every minute."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands_support import Depot, new_depot, run
from conftest import Attach, Mount
from pages_support import Page, with_places

# Of the machine's own tables this cron sees none, and no lock of its own cron; it ends with its namespace.
CRON = r"""
mount --bind "$1/cron.d" /etc/cron.d
mount --bind "$1/crontab" /etc/crontab
mount -t tmpfs tmpfs /var/spool/cron
[ ! -e /run/crond.pid ] || mount --bind "$1/crontab" /run/crond.pid
exec cron -f
"""

pytestmark = [pytest.mark.root, pytest.mark.thorough, pytest.mark.timeout(300)]


@pytest.fixture
def cron(host: Path) -> Iterator[Callable[[str], None]]:
    """Return a function that starts cron on one table."""
    if not shutil.which("cron"):
        pytest.skip("needs cron: scripts/bootstrap --test installs it")
    started: list[subprocess.Popen[bytes]] = []

    def start(table: str) -> None:
        (host / "crontab").touch()
        (host / "cron.d").mkdir()
        settings = f"BLOCKFERRY_CONFIG={host}/config.yaml\nBLOCKFERRY_STATE_DIR={host}/state\n"
        programs = Path(str(shutil.which("blockferry"))).parent
        places = {"/root/": f"{host}/root/", "/usr/local/bin": f"{programs}:/usr/local/bin"}
        (host / "cron.d/blockferry").write_text(settings + with_places(table, places))
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", CRON, "cron", str(host)]
        started.append(subprocess.Popen(apart))

    yield start
    for each in started:
        each.kill()
        each.wait()


@pytest.fixture
def depot(host: Path) -> Depot:
    made = new_depot("borg", host / "srv/backup/borg")
    (host / "root/borg-passphrase").write_text(made.env["BORG_PASSPHRASE"])
    return made


def the_snapshot(depot: Depot) -> dict[str, object]:
    """Return the one in the repository as soon as it is there: cron begins with the next minute."""
    give_up = time.monotonic() + 150
    while not (found := depot.ferry("snapshots", "--json").json()["snapshots"]):
        assert time.monotonic() < give_up
        time.sleep(1)
    return found[0]


def test_a_disk_is_backed_up(
    host: Path, depot: Depot, attach: Attach, mount: Mount, cron: Callable[[str], None]
) -> None:
    run("truncate", "-s", "16M", host / "disk.img")
    run("mke2fs", "-q", "-F", "-t", "ext4", host / "disk.img")
    disk = attach(host / "disk.img")
    mount(disk)
    (host / "config.yaml").write_text(f"repository: {depot.reference}\nvolumes: {{data: {{path: {disk}}}}}\n")
    _enable, table = Page("howto-disk.md").blocks("text")
    cron(with_places(table, {"30 2": "* *"}))
    assert the_snapshot(depot)["volume"] == "data"


def test_a_group_is_backed_up_when_it_is_due(host: Path, depot: Depot, cron: Callable[[str], None]) -> None:
    (host / "mail").mkdir()
    (host / "mail/letter").write_text("all is well\n")
    group = f"{{volume: {host}, paths: [{host}/mail], schedule: hourly}}"
    (host / "config.yaml").write_text(f"repository: {depot.reference}\ngroups: {{mail: {group}}}\n")
    cron(with_places(Page("groups-define.md").block("text"), {"*/5": "*"}))
    assert the_snapshot(depot)["volume"] == "mail"
