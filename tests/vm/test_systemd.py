"""The units under systemd itself: each does its real work with no more than it is allowed.

systemd is what started the guest: `scripts/vm --systemd -- .venv/bin/python -m pytest -p no:cacheprovider THIS`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockferry.changed.bpf import tracker
from blockferry.cluster import daemon as guarding
from blockferry.hot import arming, client
from blockferry.hot.arming import Match
from blockferry.service import NobodyThereError
from blockferry.systemd import units
from changed_support import Asked, why_no_bpftrace
from commands_support import PASSPHRASE, blockferry, command, new_depot, run
from pages_support import Page, run_shell, with_places
from udev_support import disks

pytestmark = [pytest.mark.root, pytest.mark.thorough, pytest.mark.timeout(1200)]

PAGES = Path(__file__).parents[2] / "docs"
UNITS = Path("/etc/systemd/system")
ETC = Path("/etc/blockferry")
METRICS = Path("/var/lib/prometheus/node-exporter")
SIZE = "64M"
PATIENCE = 400
"""Seconds; a guest is emulated, and others run beside it."""


class Home:
    """A mounted volume with a group on it, and repositories for both in the configuration of this machine."""

    def __init__(self, directory: Path) -> None:
        self.borg = new_depot("borg", directory / "borg")
        self.restic = new_depot("restic", directory / "restic")
        self.device = new_disk(directory / "home.img")
        self.place = directory / "home"
        self.place.mkdir()
        run("mke2fs", "-q", "-t", "ext4", self.device)
        run("mount", self.device, self.place)
        (self.place / "mail").mkdir()
        self.content = os.urandom(12 << 20)
        (self.place / "mail" / "inbox").write_bytes(self.content)

    def configuration(self) -> dict[str, Any]:
        mail = {"volume": str(self.place), "schedule": "*:*:0/10", "repository": self.restic.reference}
        return {
            "metrics": str(METRICS),
            "volumes": {"home": {"path": self.device, "repository": self.borg.reference}},
            "groups": {"mail": mail},
        }


def new_disk(image: Path) -> str:
    run("truncate", "-s", SIZE, image)
    return run("losetup", "--find", "--show", image).strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Install all units as the pages say, for this machine."""
    if Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("systemd did not start this machine: scripts/vm --systemd")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCKFERRY_STATE_DIR", "BLOCKFERRY_CONFIG"):
            patch.delenv(name)
        if "PYTHONPATH" in os.environ:
            run("systemctl", "set-environment", f"PYTHONPATH={os.environ['PYTHONPATH']}")
        if sys.executable.startswith("/tmp/"):
            drop_in(units.TRACK, "PrivateTmp=no")
        home = Home(tmp_path_factory.mktemp("home"))
        METRICS.mkdir(parents=True)
        ETC.mkdir(mode=0o700)
        (ETC / "config.yaml").write_text(json.dumps(home.configuration()))
        (ETC / "environment").write_text(f"BORG_PASSPHRASE={PASSPHRASE}\nRESTIC_PASSWORD={PASSPHRASE}\n")
        said = blockferry("systemd", "install", "--json").json()
        assert {Path(file).name for file in said["files"]} == {*units.TEMPLATES, "blockferry.conf"}
        assert Path("/var/lib/blockferry").stat().st_mode & 0o777 == 0o700
        yield home


def drop_in(unit: str, lines: str, section: str = "Service") -> None:
    directory = UNITS / f"{unit}.d"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "test.conf").write_text(f"[{section}]\n{lines}\n")
    run("systemctl", "daemon-reload")


def show(unit: str, name: str) -> str:
    return run("systemctl", "show", "--value", f"--property={name}", unit).strip()


def ended(unit: str) -> str:
    """Wait for the end of a unit that was started; return what systemd says of it, which forgets what went well."""
    eventually(lambda: show(unit, "ActiveState") in ("inactive", "failed"), f"{unit} to end")
    return show(unit, "Result")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait without taking the processor from who is waited for."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(1)


def journal(*matches: str) -> list[dict[str, Any]]:
    run("journalctl", "--sync")
    return [json.loads(line) for line in run("journalctl", "--output=json", *matches).splitlines()]


def metric(name: str, volume: str) -> float:
    lines = (METRICS / "blockferry.prom").read_text()
    (figure,) = re.findall(rf'^blockferry_backup_{name}{{volume="{volume}",.*}} (\S+)$', lines, re.MULTILINE)
    return float(figure)


def test_a_timer_has_a_group_backed_up_and_its_figures_are_in_the_journal_and_the_metrics(home: Home) -> None:
    service, timer = units.BACKUP.replace("@", "@mail"), units.TIMER.replace("@", "@mail")
    drop_in(timer, "RandomizedDelaySec=0\nAccuracySec=1", "Timer")
    assert blockferry("schedule", "install").code == 0
    assert run("systemctl", "is-enabled", timer) == "enabled\n"
    eventually(lambda: show(service, "InvocationID"), "the timer")
    run("systemctl", "stop", timer)
    assert ended(service) == "success"
    (stored,) = home.restic.archives()
    (query,) = re.findall(r"^journalctl (BLOCKFERRY_VOLUME=.*)$", (PAGES / "systemd.md").read_text(), re.MULTILINE)
    result = journal(*query.replace("=home ", "=mail ").split())[-1]
    assert int(result["BLOCKFERRY_BYTES_STORED"]) > len(home.content)
    assert journal(f"BLOCKFERRY_ARCHIVE={stored}")[-1]["BLOCKFERRY_SNAPSHOT"] == result["BLOCKFERRY_SNAPSHOT"]
    assert (metric("failing", "mail"), metric("successes_total", "mail")) == (0, 1)
    assert metric("stored_bytes", "mail") == int(result["BLOCKFERRY_BYTES_STORED"])


def test_a_backup_that_fails_leaves_a_failed_unit_until_one_goes_well(home: Home) -> None:
    service = units.BACKUP.replace("@", "@home")
    run("systemctl", "start", service)
    assert ended(service) == "exit-code"
    assert show(service, "ExecMainStatus") == "1"
    (error,) = journal("--priority=err", f"_SYSTEMD_UNIT={service}")
    assert (error["BLOCKFERRY_VOLUME"], error["BLOCKFERRY_EXIT_CODE"]) == ("home", "1")
    assert "--fsfreeze" in error["BLOCKFERRY_REMEDY"]
    assert (metric("failing", "home"), metric("failures_total", "home")) == (1, 1)

    drop_in(service, f"ExecStart=\nExecStart={command()[0]} backup %i --fsfreeze 60")
    run("systemctl", "start", service)
    assert ended(service) == "success", journal(f"_SYSTEMD_UNIT={service}")[-5:]
    assert len(home.borg.archives()) == 1
    assert journal("BLOCKFERRY_VOLUME=home")[-1]["BLOCKFERRY_TIER"] == "used"
    assert (metric("failing", "home"), metric("successes_total", "home")) == (0, 1)


def test_an_armed_device_that_shows_up_can_be_mounted_before_all_is_there(home: Home, tmp_path: Path) -> None:
    assert blockferry("udev", "install").code == 0
    place = tmp_path / "restored"
    place.mkdir()
    with disks(tmp_path) as new:
        disk = new(SIZE)
        service = units.RESTORE.replace("@", f"@{disk.match}")
        if not home.borg.archives():  # no other test ran before
            assert home.borg.ferry("backup", "home", "--fsfreeze", "60").code == 0
        words = ("arm", "latest", disk.match, "--name", "unit", "--mount", place, "--rate", "100K", "--json")
        home.borg.ferry(*words).json()
        disk.plug_in()
        eventually(lambda: show(service, "ActiveState") == "active", "the restore")
        assert place.is_mount()
        assert not client.ask("unit", {"do": "status"})["finished"]
        assert " % there" in show(service, "StatusText")
        assert (place / "mail" / "inbox").read_bytes() == home.content
        (place / "new").write_bytes(home.content)

        run("systemctl", "stop", service)
        assert not place.is_mount()
        run("udevadm", "trigger", "--action=change", "--settle", disk.device)
        assert show(service, "ActiveState") == "inactive", "what was stopped stays so, whoever looks at the disk"
        armed = arming.load(Match.parse(disk.match))
        assert armed
        arming.arm(arming.Armed(**vars(armed) | {"rate": None}))
        run("systemctl", "start", service)
        assert (place / "new").read_bytes() == home.content
        assert ended(service) == "success"
        assert arming.load(Match.parse(disk.match)) is None
        assert (place / "mail" / "inbox").read_bytes() == home.content, "it has moved to the disk, and stays mounted"
        run("umount", place)
        assert blockferry("detach", "unit").code == 0
        run("e2fsck", "-fn", disk.device)


def guard_says(path: str = "") -> bool:
    try:
        said = guarding.ask("lun0", {"do": "status"})
    except NobodyThereError:
        return False
    return not path or said["path"] == path


def test_a_guard_keeps_its_volume_mounted_whatever_becomes_of_it(home: Home, tmp_path: Path) -> None:
    service = units.GUARD.replace("@", "@lun0")
    index = f"sqlite://{tmp_path}/index.db"
    device = new_disk(tmp_path / "lun0.img")
    run("mke2fs", "-q", "-t", "ext4", device)
    (ETC / "guard-lun0").write_text(f"VOLUME={device}\nBLOCKFERRY_INDEX={index}\n")
    (line,) = re.findall(
        r"^/run/blockferry/guard/lun0.disk .*$", (PAGES / "shared-volumes.md").read_text(), re.MULTILINE
    )
    Path("/etc/fstab").write_text(line.replace("ocfs2", "ext4").replace("x-systemd.requires=o2cb.service,", "") + "\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", service)
    run("systemctl", "start", "srv.mount")
    eventually(lambda: guard_says("direct"), "the guard to be out of the path")
    note = Path("/srv/note")
    note.write_text("before")
    said = home.restic.ferry(
        *("cluster", "backup", device, "--name", "lun0", "--host", os.uname().nodename, "--json"),
        BLOCKFERRY_INDEX=index,
    ).json()
    assert home.restic.ferry("show", said["snapshot"], "--json").json()["stability"] == "frozen"

    process = int(show(service, "MainPID"))
    os.kill(process, signal.SIGKILL)
    note.write_text("while it is dead")
    os.sync()
    eventually(lambda: show(service, "NRestarts") == "1" and guard_says("direct"), "the next one")
    assert [each["MESSAGE"] for each in journal("--unit=srv.mount") if "nmount" in each["MESSAGE"]] == []
    run("systemctl", "stop", service)
    note.write_text("without")
    os.sync()
    run("systemctl", "stop", "srv.mount")
    eventually(lambda: not Path("/dev/mapper/blockferry-guard-lun0").exists(), "its device to be gone")
    run("e2fsck", "-fn", device)


def test_a_tracker_notes_what_is_written(home: Home) -> None:
    if why := why_no_bpftrace():
        pytest.fail(why)
    _install_them, enable = Page("tracking-bpf.md").blocks(below="From boot on")[0].splitlines()
    assert Page("howto-disk.md").blocks("text")[0] == with_places(f"{enable}\n", {"/dev/vg/home": "/dev/sdb1"})
    run_shell(enable, {"/dev/vg/home": home.device})
    instance = run("systemd-escape", "--path", home.device).strip()
    service = units.TRACK.replace("@", f"@{instance}")
    asked = Asked(tracker, Path(home.device))
    since = asked.checkpoint()
    (home.place / "tracked").write_bytes(os.urandom(1 << 20))
    run("sync", "--file-system", home.place)
    assert asked.changed(since).total >= 1 << 20
    run("systemctl", "disable", "--now", service)
    assert show(service, "Result") == "success"


def test_running_units_are_as_safe_as_the_page_says(home: Home) -> None:
    page = dict(
        re.findall(
            r"^\| `(blockferry-\w+@\.service)` \|.*\| (\d+\.\d) \|$", (PAGES / "systemd.md").read_text(), re.MULTILINE
        )
    )
    found = {}
    for template in page:
        said = run("systemd-analyze", "security", "--no-pager", template.replace("@", "@any"))
        found[template] = re.findall(r"Overall exposure level for .*: (\d+\.\d)", said)[0]
    assert found == page
