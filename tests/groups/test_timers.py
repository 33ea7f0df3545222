"""The units that `blockferry schedule` writes: systemd understands them, and nobody else's are touched."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blockferry import systemd
from blockferry.config.configuration import load_configuration
from blockferry.errors import BlockferryError, UsageError
from blockferry.groups import timers
from blockferry.groups.definition import Group
from blockferry.groups.patterns import Verdict
from blockferry.groups.schedule import record_run
from blockferry.manager import plugin_manager
from commands_support import blockferry, command

PAGE = Path(__file__).parents[2] / "docs" / "groups-define.md"
CONFIG = """\
groups:
  mail: {volume: /mnt/data, schedule: hourly}
  www: {volume: /mnt/data, schedule: "Mon..Sat 02:30"}
  by-hand: {volume: /mnt/data}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def units(tmp_path: Path) -> Path:
    directory = tmp_path / "units"
    directory.mkdir()
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def group(name: str, schedule: str = "hourly") -> Group:
    return Group.parse(name, {"volume": "/mnt/data", "schedule": schedule}, "there")


def test_each_group_that_has_a_schedule_has_a_timer(config: Path, units: Path) -> None:
    done = blockferry("--config", config, "schedule", "install", "--directory", units)
    assert done.code == 0
    expected = ["blockferry-backup@.service", "blockferry-backup@mail.timer", "blockferry-backup@www.timer"]
    assert names(units) == expected
    assert sorted(done.out.splitlines()) == [str(units / name) for name in expected]
    assert "OnCalendar=Mon..Sat 02:30\n" in (units / expected[2]).read_text()
    service = (units / expected[0]).read_text()
    assert f'Environment="BLOCKFERRY_CONFIG={config}"\n' in service
    assert f'ExecStart="{command()[0]}" backup %i\n' in service


def test_a_schedule_that_changed_is_written_anew_and_one_that_is_gone_is_removed(config: Path, units: Path) -> None:
    blockferry("--config", config, "schedule", "install", "--directory", units)
    config.write_text("groups: {www: {volume: /mnt/data, schedule: daily}}")
    said = blockferry("--config", config, "schedule", "install", "--directory", units, "--json").json()
    assert said["removed"] == [f"{units}/blockferry-backup@mail.timer"]
    assert "OnCalendar=daily\n" in (units / "blockferry-backup@www.timer").read_text()
    config.write_text("")
    blockferry("--config", config, "schedule", "install", "--directory", units)
    assert names(units) == []


def test_units_that_somebody_else_wrote_stay(config: Path, units: Path) -> None:
    others = ["blockferry-backup@mine.timer", "other.timer", "blockferry-backup@mail.timer.d"]
    for name in others[:2]:
        (units / name).write_text("[Timer]\nOnCalendar=daily\n")
    (units / others[2]).mkdir()
    blockferry("--config", config, "schedule", "install", "--directory", units)
    assert blockferry("schedule", "remove", "--directory", units).out.count("removed ") == 3
    assert names(units) == sorted(others)
    assert blockferry("schedule", "remove", "--directory", units).out == "there was nothing to remove\n"


@pytest.mark.parametrize("known_by", ["systemd", "blockferry"])
def test_a_schedule_that_is_none_is_refused_before_anything_is_written(
    units: Path, monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    if known_by == "blockferry":
        monkeypatch.setattr(timers, "look_for", lambda _name: None)
    elif not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    with pytest.raises(UsageError, match=r"www: .*'often'") as caught:
        timers.install([group("mail"), group("www", "often")], units, "")
    assert "Mon..Fri" in caught.value.remedy
    with pytest.raises(UsageError):
        timers.check(group("www", "--help"))
    assert names(units) == []


def test_what_only_systemd_understands_is_left_to_it(units: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    timers.install([group("utc", "*-*~1 12:00 UTC")], units, "")
    assert "OnCalendar=*-*~1 12:00 UTC\n" in (units / "blockferry-backup@utc.timer").read_text()


def test_systemd_understands_the_units(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    units = tmp_path / "units"
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", f'{tmp_path}/100% of "state"')
    blockferry("--config", config, "schedule", "install", "--directory", units)
    shutil.copy(units / "blockferry-backup@.service", units / "blockferry-backup@mail.service")
    verify = ["systemd-analyze", "verify", "--man=no", units / "blockferry-backup@mail.service", *units.glob("*.timer")]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "blockferry" in line] == []
    assert done.returncode == 0, done.stderr


@pytest.fixture
def running_systemd(units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for a systemd that reads `units`: a systemctl that writes down what it was told."""
    told = tmp_path / "told"
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(
        f'#!/bin/sh\necho "$*" >>{told}\n! test -e {tmp_path}/broken || {{ echo "no bus" >&2; exit 1; }}\n'
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(systemctl.parent), prepend=":")
    monkeypatch.setattr(systemd, "runs", lambda: True)
    monkeypatch.setattr(systemd, "UNITS", units)
    return told


def test_where_systemd_runs_timers_are_started_and_stopped(units: Path, running_systemd: Path) -> None:
    timers.install([group("mail"), group("www"), group("by-hand", "")], units, "")
    timers.install([group("www")], units, "")
    timers.remove(units)
    timers.remove(units)
    mail, www = "blockferry-backup@mail.timer", "blockferry-backup@www.timer"
    assert running_systemd.read_text().splitlines() == [
        "daemon-reload",
        f"enable --now {mail} {www}",
        f"disable --now {mail}",
        "daemon-reload",
        f"enable --now {www}",
        f"disable --now {www}",
        "daemon-reload",
    ]


def test_elsewhere_nothing_is_started(tmp_path: Path, running_systemd: Path) -> None:
    timers.install([group("mail")], tmp_path / "image" / "units", "")
    timers.remove(tmp_path / "image" / "units")
    assert not running_systemd.exists()


def test_a_systemd_that_refuses_is_quoted(units: Path, tmp_path: Path, running_systemd: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(BlockferryError, match="daemon-reload: no bus"):
        timers.install([group("mail")], units, "")
    assert running_systemd.exists()


def test_show_says_what_ran_and_what_is_due(
    config: Path, units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    config.write_text(
        CONFIG + "  utc: {volume: /mnt/data, schedule: 12:00 UTC}\n  later: {volume: /a, schedule: 2199-1-1}\n"
    )
    record_run("www", datetime.datetime.now(datetime.UTC), ok=False)
    (units / timers.timer("www")).touch()
    shown = blockferry("--config", config, "schedule", "show", "--directory", units, "--json").json()["groups"]
    by_name = {each["name"]: (each["due"], each["ok"], each["timer"], bool(each["remark"])) for each in shown}
    assert by_name == {
        "mail": (True, None, False, False),
        "www": (False, False, True, False),
        "utc": (None, None, False, True),
        "later": (False, None, False, False),
    }
    table = blockferry("--config", config, "schedule", "show", "--directory", units)
    assert table.code == 0
    assert re.search(r"mail .* never .* due", table.out)


def test_the_example_on_the_page_means_what_the_page_says(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "config.yaml").write_text(text)
    configuration = load_configuration(plugin_manager(), str(tmp_path / "config.yaml"))
    rules = configuration.group("mail").rules
    assert rules.verdict("mail/ann/archive/2019.lock") is Verdict.INCLUDE
    assert rules.verdict("mail/ann/inbox.lock") is Verdict.EXCLUDE
    assert rules.verdict("mail/ann/.cache") is Verdict.EXCLUDE_NO_RECURSE
    for each in configuration.groups.values():
        timers.check(each)
