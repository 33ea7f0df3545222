"""`blockferry schedule`: backups of groups that begin by themselves."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Any

import click

from blockferry import systemd
from blockferry.cli.context import Context, Decorated, json_option
from blockferry.cli.output import Listing
from blockferry.config.configuration import USUAL
from blockferry.errors import UsageError
from blockferry.groups import timers
from blockferry.groups.definition import Group
from blockferry.groups.schedule import Run, due, last_runs, latest_time

log = logging.getLogger(__name__)


def _directory_option(function: Decorated) -> Decorated:
    """Add `--directory`."""
    return click.option(
        "--directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=systemd.UNITS,
        show_default=True,
        help="Where systemd's units are; elsewhere they are written, but not started.",
    )(function)


@click.group()
def schedule() -> None:
    """Backups of groups that begin by themselves."""


@schedule.command()
@_directory_option
@json_option
@click.pass_obj
def install(context: Context, directory: Path) -> None:
    """Write a systemd timer for each group that has a schedule, and start it; remove those of other groups.

    To be run again whenever a schedule in the configuration was changed.

    \b
    Example:
      blockferry schedule install
    """
    configuration = context.configuration
    named = "" if configuration.file == USUAL else configuration.file
    changes = timers.install(configuration.groups.values(), directory, named)
    if not systemd.runs():
        log.warning("systemd does not run here: have cron run `blockferry backup --due` instead")
    _tell(context, changes, "no group has a schedule")


@schedule.command()
@_directory_option
@json_option
@click.pass_obj
def remove(context: Context, directory: Path) -> None:
    """Stop and remove the timers and the service that `install` wrote.

    \b
    Example:
      blockferry schedule remove
    """
    _tell(context, timers.remove(directory), "there was nothing to remove")


@schedule.command()
@_directory_option
@json_option
@click.pass_obj
def show(context: Context, directory: Path) -> None:
    """List the groups that have a schedule, when each ran last, and whether it is due.

    \b
    Example:
      blockferry schedule show
    """
    runs, now = last_runs(), datetime.datetime.now(datetime.UTC)
    groups = [group for group in context.configuration.groups.values() if group.schedule]
    found = [_state(group, runs.get(group.name), now, directory) for group in groups]

    def listing() -> Listing:
        columns = ("group", "schedule", "came last", "ran last", "", "timer", "")
        return Listing(columns, [_row(each) for each in found])

    context.output.result({"version": 1, "groups": found}, listing)


def _state(group: Group, run: Run | None, now: datetime.datetime, directory: Path) -> dict[str, Any]:
    """Return what there is to say of a group's schedule; times in UTC."""
    try:
        latest, remark = latest_time(group.schedule, now), ""
        is_due = bool(due([group], {group.name: run} if run else {}, now))
    except UsageError as error:
        latest, is_due, remark = None, None, error.message
    return {
        "name": group.name,
        "schedule": group.schedule,
        "latest": latest.isoformat() if latest else None,
        "began": run.began.isoformat() if run else None,
        "ok": run.ok if run else None,
        "due": is_due,
        "timer": (directory / timers.timer(group.name)).is_file(),
        "remark": remark,
    }


def _row(each: dict[str, Any]) -> tuple[str, ...]:
    """Return what a person is shown of a group, its times in local time."""
    state = {True: "due", False: "", None: each["remark"]}[each["due"]]
    ended = {True: "ok", False: "failed", None: ""}[each["ok"]]
    timer = "installed" if each["timer"] else "none"
    return (each["name"], each["schedule"], _local(each["latest"]), _local(each["began"]), ended, timer, state)


def _local(time: str | None) -> str:
    return datetime.datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "never"


def _tell(context: Context, changes: timers.Changes, otherwise: str) -> None:
    written, removed = list(map(str, changes.written)), list(map(str, changes.removed))

    def sentence() -> str:
        return "\n".join([*written, *(f"removed {path}" for path in removed)]) or otherwise

    context.output.result({"version": 1, "files": written, "removed": removed}, sentence)
