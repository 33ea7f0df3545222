"""systemd's units for the groups that have a schedule: one service for all, and a timer for each."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterable
from pathlib import Path

from blockferry import systemd
from blockferry.errors import UsageError
from blockferry.groups.definition import Group
from blockferry.groups.oncalendar import EXAMPLES, Calendar
from blockferry.programs import find, look_for
from blockferry.systemd import units

SERVICE = units.BACKUP
_WRITTEN = units.written_by("schedule")


@dataclasses.dataclass(frozen=True)
class Changes:
    """The files that were written and removed."""

    written: list[Path]
    removed: list[Path]


def timer(group: str) -> str:
    """Return the file name of a group's timer."""
    return units.TIMER.replace("@", f"@{group}")


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
    named = units.own_environment(config)
    return units.text(SERVICE, _WRITTEN, command=systemd.quoted(command), environment=named)


def _timer(group: Group) -> str:
    return units.text(units.TIMER, _WRITTEN, name=group.name, schedule=group.schedule)


def _ours(directory: Path) -> list[Path]:
    """Return the units in a directory that `install` wrote, the timers first."""
    found = [*sorted(directory.glob(timer("*"))), directory / SERVICE]
    return [path for path in found if path.is_file() and _WRITTEN in path.read_text(errors="replace")]


def _remove(files: list[Path], directory: Path) -> list[Path]:
    """Stop timers and remove units."""
    timers = [path.name for path in files if path.name != SERVICE]
    if timers and _is_read(directory):
        _systemctl("disable", "--now", *timers)
    for path in files:
        path.unlink()
    return files


def _is_read(directory: Path) -> bool:
    """Tell whether systemd runs and reads its units there."""
    return systemd.runs() and directory == systemd.UNITS


def _systemctl(*words: str) -> None:
    systemd.run(find("systemctl"), *words)
