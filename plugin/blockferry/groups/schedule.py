"""Which groups are due: what ran when, as this host remembers it, against the time that has come since."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from blockferry.errors import UsageError
from blockferry.groups.definition import Group
from blockferry.groups.oncalendar import Calendar
from blockferry.kernel import sync_directory
from blockferry.state import state_directory

log = logging.getLogger(__name__)

_SECOND = datetime.timedelta(seconds=1)


@dataclasses.dataclass(frozen=True)
class Run:
    """The last time that a group was backed up, or that this was tried."""

    began: datetime.datetime
    """With a time zone."""
    ok: bool


def due(groups: Iterable[Group], last_runs: Mapping[str, Run], now: datetime.datetime) -> list[Group]:
    """Return the groups whose time has come since their last run began, in the given order.

    However often it came, that is one run. One that failed is not tried again before the next time comes; a group that
    never ran is due. `now` has a time zone; the schedules are in local time. Raise UsageError, naming the group, if a
    schedule is none that can be told without systemd.
    """
    found = []
    for group in groups:
        if not group.schedule:
            continue
        try:
            latest = latest_time(group.schedule, now)
        except UsageError as error:
            raise UsageError(f"{group.name}: {error.message}", remedy=error.remedy) from None
        run = last_runs.get(group.name)
        # A run in the future was written down while the clock was wrong: it says nothing.
        if latest and (run is None or run.began < latest or run.began > now):
            found.append(group)
    return found


def latest_time(schedule: str, now: datetime.datetime) -> datetime.datetime | None:
    """Return the last time, at or before `now`, that a schedule names; None if there was none."""
    calendar = Calendar.parse(schedule)
    latest = calendar.latest(datetime.datetime.fromtimestamp(now.timestamp()))
    # A time that the clocks skip in spring is an hour later than it says: it may not have come yet.
    while latest and latest.timestamp() > now.timestamp():
        latest = calendar.latest(latest - _SECOND)
    return latest.astimezone(datetime.UTC) if latest else None


def last_runs() -> dict[str, Run]:
    """Return the last run of each group on this host. A file that cannot be read costs a run too many, no more."""
    path = _file()
    try:
        runs = json.loads(path.read_text())["runs"]
        return {
            name: Run(datetime.datetime.fromisoformat(run["began"]).astimezone(datetime.UTC), bool(run["ok"]))
            for name, run in runs.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        log.warning("%s: cannot be read (%s): what ran when is not known any more", path, error)
        return {}


def record_run(name: str, began: datetime.datetime, ok: bool) -> None:
    """Remember, durably, when a group's last run began, and whether it went well. `began` has a time zone."""
    with _locked():
        runs = last_runs() | {name: Run(began.astimezone(datetime.UTC), ok)}
        entries = {each: {"began": run.began.isoformat(), "ok": run.ok} for each, run in runs.items()}
        path = _file()
        temporary = path.with_name(f".{path.name}.new")
        with temporary.open("w") as file:
            json.dump({"version": 1, "runs": entries}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def _file() -> Path:
    return state_directory() / "schedule.json"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the right to change what is remembered."""
    with (state_directory() / ".schedule.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
