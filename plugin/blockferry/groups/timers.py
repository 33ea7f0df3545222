"""systemd's units for the groups that have a schedule: one service for all, and a timer for each."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from blockferry import systemd
from blockferry.errors import UsageError
from blockferry.groups.definition import Group
from blockferry.groups.oncalendar import EXAMPLES, Calendar
from blockferry.programs import find, look_for

SERVICE = "blockferry-backup@.service"
_WRITTEN = "Written by `blockferry schedule install`."

_SERVICE = """\
# Backs up the group %i. {written}
[Unit]
Description=Backup of the group %i
Wants=network-online.target
After=network-online.target

[Service]
# Not oneshot: one of those cannot be restarted by its exit status alone.
Type=exec
# Where borg and restic keep what they know, as for whoever installed it.
Environment=HOME=%h
{environment}# Where the passphrase comes from: BORG_PASSCOMMAND=..., RESTIC_PASSWORD_FILE=..., and the like.
EnvironmentFile=-/etc/blockferry/environment
ExecStart={command} backup %i
# The repository is locked, or another backup is running.
RestartForceExitStatus=75
RestartSec=300
"""

_TIMER = """\
# When the group {name} is backed up. {written}
[Unit]
Description=Backup of the group {name} by its schedule

[Timer]
OnCalendar={schedule}
# What was missed while the machine was down is made up for, once.
Persistent=true
# Hosts that share a repository do not all begin at the same second.
RandomizedDelaySec=60

[Install]
WantedBy=timers.target
"""


@dataclasses.dataclass(frozen=True)
class Changes:
    """The files that were written and removed."""

    written: list[Path]
    removed: list[Path]


def timer(group: str) -> str:
    """Return the file name of a group's timer."""
    return f"blockferry-backup@{group}.timer"


def install(groups: Iterable[Group], directory: Path, config: str) -> Changes:
    """Write the service and a timer for each group that has a schedule, and remove those of other groups.

    Where systemd reads the directory, and runs, the timers are started. `config` is the configuration file that the
    service is to read, "" for the usual one. Raise UsageError, before anything is written, for a schedule that is none.
    """
    scheduled = [group for group in groups if group.schedule]
    for group in scheduled:
        check(group)
    wanted = {timer(group.name): _timer(group) for group in scheduled}
    kept = {SERVICE, *wanted} if wanted else set()
    removed = _remove([path for path in _ours(directory) if path.name not in kept], directory)
    written = []
    if wanted:
        written = [systemd.write(directory / name, content) for name, content in wanted.items()]
        written.append(systemd.write(directory / SERVICE, service(systemd.own_command(), config)))
    if _is_read(directory):
        _systemctl("daemon-reload")
        if wanted:
            _systemctl("enable", "--now", *wanted)
    return Changes(written, removed)


def remove(directory: Path) -> Changes:
    """Stop and remove whatever `install` wrote."""
    removed = _remove(_ours(directory), directory)
    if removed and _is_read(directory):
        _systemctl("daemon-reload")
    return Changes([], removed)


def check(group: Group) -> None:
    """Raise UsageError, naming the group, if its schedule is not understood: by systemd, or else by ourselves."""
    analyze = look_for("systemd-analyze")
    if analyze is None:
        try:
            Calendar.parse(group.schedule)
        except UsageError as error:
            raise UsageError(f"{group.name}: {error.message}", remedy=error.remedy) from None
        return
    done = subprocess.run([analyze, "calendar", "--", group.schedule], capture_output=True, check=False)
    if done.returncode:
        raise UsageError(f"{group.name}: systemd does not understand the schedule {group.schedule!r}", remedy=EXAMPLES)


def service(command: str, config: str) -> str:
    """Return the template of the service: `command` runs us."""
    named = {"BLOCKFERRY_CONFIG": config, "BLOCKFERRY_STATE_DIR": os.environ.get("BLOCKFERRY_STATE_DIR", "")}
    environment = "".join(
        f"Environment={systemd.quoted(f'{name}={os.path.abspath(value)}')}\n"  # noqa: PTH100  # a link stays one
        for name, value in named.items()
        if value
    )
    return _SERVICE.format(written=_WRITTEN, environment=environment, command=systemd.quoted(command))


def _timer(group: Group) -> str:
    return _TIMER.format(written=_WRITTEN, name=group.name, schedule=group.schedule)


def _ours(directory: Path) -> list[Path]:
    """Return the units in a directory that `install` wrote, the timers first."""
    found = [*sorted(directory.glob(timer("*"))), directory / SERVICE]
    return [path for path in found if path.is_file() and _WRITTEN in path.read_text(errors="replace")]


def _remove(units: list[Path], directory: Path) -> list[Path]:
    """Stop timers and remove units."""
    timers = [path.name for path in units if path.name != SERVICE]
    if timers and _is_read(directory):
        _systemctl("disable", "--now", *timers)
    for path in units:
        path.unlink()
    return units


def _is_read(directory: Path) -> bool:
    """Tell whether systemd runs and reads its units there."""
    return systemd.runs() and directory == systemd.UNITS


def _systemctl(*words: str) -> None:
    systemd.run(find("systemctl"), *words)
