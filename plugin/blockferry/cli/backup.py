"""`blockferry backup`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal

from blockferry.backup import Result, back_up
from blockferry.cli import completion as complete
from blockferry.cli.afterwards import remember, thin_out
from blockferry.cli.context import Context, json_option, no_job_option, repository_option
from blockferry.cli.output import Bar
from blockferry.config.reference import is_foreign
from blockferry.difference import LATEST, Choice
from blockferry.errors import UsageError
from blockferry.forecast import Forecast, forecast
from blockferry.hookspecs import FreezeOptions
from blockferry.repository import Repository
from blockferry.volume import Volume

if TYPE_CHECKING:
    from blockferry.groups.definition import Group


@click.command()
@click.argument("volume", metavar="VOLUME|GROUP", required=False, shell_complete=complete.volumes_and_groups)
@repository_option
@click.option("--due", is_flag=True, help="Back up the groups whose time has come by their schedules, as cron may ask.")
@click.option("--name", default="", help="The volume's name in the repository; else the end of its path.")
@click.option(
    "--fsfreeze",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Freeze a mounted filesystem while it is read, for at most so long.",
)
@click.option("--allow-live", is_flag=True, help="Read a volume that nothing holds still; its blocks may not fit.")
@click.option(
    "--since",
    metavar="SNAPSHOT",
    default=LATEST,
    shell_complete=complete.since,
    help="List what changed since this snapshot; `latest` (the default), or `none` to read every block in use.",
)
@click.option("--incremental", is_flag=True, help="Store only what changed, as a part on top of that snapshot.")
@click.option("--tracker", default="", metavar="NAME", help="Use only this tracker; `none`: no tracker at all.")
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=Choice.sample,
    show_default=True,
    help="Compare so many pieces that did not change with the earlier snapshot.",
)
@click.option("--dry-run", is_flag=True, help="Store nothing: say what would be read, and why not less.")
@click.option("--plan", "picture", is_flag=True, help="Like --dry-run, and show it as a picture of the volume.")
@no_job_option
@json_option
@click.pass_obj
def backup(
    context: Context,
    volume: str | None,
    reference: str | None,
    due: bool,
    name: str,
    fsfreeze: float | None,
    allow_live: bool,
    since: str,
    incremental: bool,
    tracker: str,
    sample: int,
    dry_run: bool,
    picture: bool,
    no_job: bool,
) -> None:
    """Store VOLUME as one snapshot: the blocks in use, of which those are read that changed since an earlier one.

    GROUP is the name of a group of files in the configuration: its files are stored, read in the order of the disk.

    \b
    Examples:
      blockferry backup /dev/vg/home --repo borg:ssh://nas/./volumes
      blockferry backup /dev/vg/home --repo borg:ssh://nas/./volumes --plan
    """
    dry_run = dry_run or picture
    if due:
        if volume or reference or dry_run:
            raise UsageError(
                "--due takes no volume, repository or --dry-run",
                remedy="The configuration says what is due, and where to.",
            )
        _groups().back_up_due(context, job=not no_job)
        return
    if not volume:
        raise UsageError("no volume or group was named", remedy="Name one, or say --due for the groups that are due.")
    only = {"--name": name, "--fsfreeze": fsfreeze, "--allow-live": allow_live, "--incremental": incremental}
    group = _named_group(context, volume, only | {"--tracker": tracker})
    if group and dry_run:
        _tell(context, _groups().foresee(context, group, reference, since), picture=picture)
        return
    if group:
        _groups().back_up_one(context, group, reference, since, job=not no_job)
        return
    meant = context.volume(volume, name, reference)
    freeze = FreezeOptions(fsfreeze_seconds=fsfreeze, allow_live=allow_live)
    choice = Choice(since=since, tracker=tracker, incremental=incremental, sample=sample)
    if dry_run:
        with context.repository(meant.repository) as repository:
            found = Volume.discover(meant.path, meant.name)
            foreseen = forecast(context.manager, found, repository, freeze=freeze, choice=choice)
        _tell(context, foreseen, picture=picture)
        return
    if incremental and not no_job and is_foreign(context.reference(meant.repository)):
        raise UsageError(
            "--incremental: the tool whose file names the repository would remove what the part lies on",
            remedy="Leave it out: what did not change is not stored anew; or say --no-job.",
        )

    def store(repository: Repository) -> Result:
        found = Volume.discover(meant.path, meant.name)
        made = back_up(context.manager, found, repository, freeze=freeze, choice=choice, progress=context.output)
        remember(context, repository.reference, made)
        thin_out(context, repository, found.name, meant.keep)
        return made

    result = context.back_up(meant.repository, meant.name, store, job=not no_job)
    context.output.result(result.as_json(), lambda: _sentence(result))
    context.complain()


def _sentence(result: Result) -> str:
    record = result.record
    sizes = (
        f"{decimal(record.bytes_used)} in use of {decimal(record.size)}, "
        f"read {decimal(result.bytes_read)}, stored {decimal(result.bytes_stored)}"
    )
    lines = [
        f"snapshot {result.snapshot.id} of {record.volume}: {sizes}, in {result.seconds:.1f} s",
        f"  {record.tier.value} blocks by {record.method}; {record.stability.value} by {record.freeze}",
    ]
    if record.tracker:
        kind = "a part on top of" if record.part else "changes since"
        lines.append(f"  {kind} snapshot {record.base}: {decimal(record.bytes_changed)}, by {record.tracker}")
    if record.tier_reason:
        lines.append(f"  {record.tier_reason}")
    return "\n".join(lines)


def _tell(context: Context, foreseen: Forecast, *, picture: bool) -> None:
    """Say what a backup would do."""

    def words() -> str | Bar:
        told = _foreseen(foreseen.figures)
        if picture and foreseen.shades:
            return Bar(told, foreseen.size, foreseen.shades)
        return f"{told}\n  no picture: it is not known where on a device that is" if picture else told

    context.output.result(foreseen.as_json(), words)


def _foreseen(figures: Mapping[str, Any]) -> str:
    """Return what a backup would do, in words."""
    what, of = ("the group ", "") if "group" in figures else ("", f" of {decimal(figures['bytes_volume'])}")
    lines = [
        (
            f"a backup of {what}{figures['volume']} would read {decimal(figures['bytes_read'])}: "
            f"{decimal(figures['bytes_used'])} in use{of}; nothing was stored"
        ),
        f"  {figures['tier']} blocks by {figures['method']}; {figures['stability']} by {figures['freeze']}",
    ]
    if figures["base"]:
        kind = "a part on top of" if figures["part"] else "changes since"
        by = f", by {figures['tracker']}" if figures["tracker"] else ""
        lines.append(f"  {kind} snapshot {figures['base']}: {decimal(figures['bytes_changed'])}{by}")
    if figures["tier_reason"]:
        lines.append(f"  {figures['tier_reason']}")
    return "\n".join(lines)


def _named_group(context: Context, name: str, options: Mapping[str, object]) -> Group | None:
    """Return the group of a name, None if it is no group's; UsageError for options that are of volumes only."""
    if "/" in name or name not in context.configuration.groups:
        return None
    given = [option for option, value in options.items() if value]
    if given:
        raise UsageError(f"{name}: is a group of files; {', '.join(given)} is for volumes", remedy="Leave it out.")
    return context.configuration.group(name)


def _groups() -> ModuleType:
    """Return what backs groups up: a backup of a volume need not load it."""
    return importlib.import_module("blockferry.cli.group")
