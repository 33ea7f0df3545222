"""`blockferry export` and `release`: volumes as files, around the job of another tool."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import click
from rich.filesize import decimal

from blockferry.cli.context import Context, json_option
from blockferry.cli.output import log
from blockferry.difference import LATEST
from blockferry.errors import BlockferryError, UsageError
from blockferry.export import client, job, note
from blockferry.export.client import Request
from blockferry.export.note import Note
from blockferry.repository import EXPORTED
from blockferry.volume import default_name

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """Return seconds, of a number with s, m, h or d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match or not float(match[1]):
        raise click.BadParameter(f"{text!r} is not a time such as 90m, 24h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


at_option = click.option(
    "--at", metavar="DIR", help="The directory; else `export` in the state directory. It stays there, empty."
)


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@at_option
@click.option(
    "--as",
    "kind",
    type=click.Choice(["segments", "image"]),
    default="segments",
    show_default=True,
    help="Many files, of which only changed ones are read again; or one file, read as a whole when anything changed.",
)
@click.option("--allow-live", is_flag=True, help="Show a volume that nothing holds still; its blocks may not fit.")
@click.option(
    "--since", type=click.Choice([LATEST, "none"]), default=LATEST, help="`none`: all counts as changed, as if new."
)
@click.option("--tracker", default="", metavar="NAME", help="Use only this tracker; `none`: no tracker at all.")
@click.option(
    "--max-age",
    default="24h",
    show_default=True,
    callback=parse_duration,
    metavar="TIME",
    help="End by itself after so long.",
)
@json_option
@click.pass_obj
def export(
    context: Context,
    names: tuple[str, ...],
    at: str | None,
    kind: str,
    allow_live: bool,
    since: str,
    tracker: str,
    max_age: float,
) -> None:
    """Show volumes as files, as they are now, for the job of another tool to back up, until `release`.

    NAME is a volume or a group of files of the configuration, or a volume's path. What is not in use is left out.
    Files, or segments of an image, have another modification time if and only if their content may have changed,
    whatever became of the last job.

    \b
    Example:
      blockferry export home && borgmatic create; blockferry release home
    """
    began, groups = time.monotonic(), context.configuration.groups
    request = Request(
        at=os.path.realpath(at) if at else client.usual_directory(),
        volumes=tuple(_named(context, name) for name in names if name not in groups),
        groups=tuple(groups[name].as_json() for name in names if name in groups),
        as_segments=kind == "segments",
        allow_live=allow_live,
        since=since,
        tracker=tracker,
        max_age=max_age,
        job=tuple(job.processes()),
    )
    _refuse_twins(request)
    try:
        said = client.start(context.manager, request)
    except BaseException as error:
        for name in request.note.names:
            context.tell_failure(name, EXPORTED, error)
        raise
    said |= {"version": 1, "seconds": round(time.monotonic() - began, 3)}
    context.output.result(said, lambda: "\n".join(_line(each, kind) for each in said["volumes"]))


@click.command()
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--at", metavar="DIR", help="Only what is shown at this directory.")
@click.option("--failed", is_flag=True, help="The job has failed already: do not fail for what it could not read.")
@click.option("--force", is_flag=True, help="Although it belongs to another job, which still runs.")
@json_option
@click.pass_obj
def release(context: Context, names: tuple[str, ...], at: str | None, failed: bool, force: bool) -> int:
    """End the export of the volumes NAME, or all of them, and let go of what holds them still.

    What was exported together ends together. There may be nothing to end. Exits with 1 if the job cannot have read all
    that it should have: a volume did not hold still, or the export ended before.

    \b
    Example:
      blockferry release home
    """
    client.usual_directory()
    said, refused = [], []
    for each in _meant(context, names, at):
        try:
            said.append(client.release(context.manager, each, force=force, failed=failed))
        except BlockferryError as error:
            refused.append(error)
    for one in said:
        if one["failure"] and not failed:
            log.error("%s: what was read there is not all of it, delete the archive: %s", one["at"], one["failure"])

    def sentence() -> str:
        lines = [f"{one['at']}: released, {_read(one)}" for one in said]
        return "\n".join(lines or ["nothing is exported"])

    if said or not refused:
        context.output.result({"version": 1, "released": said}, sentence)
    if refused:
        raise refused[0]
    return int(any(one["failure"] for one in said) and not failed)


def _meant(context: Context, names: tuple[str, ...], at: str | None) -> list[Note]:
    """Return the exports to be released; UsageError for a name that nobody knows."""
    found = [each for each in note.load_all() if at is None or each.at == os.path.realpath(at)]
    exported = {name for each in found for name in each.names}
    # What is exported may be gone from the configuration.
    wanted = {name if name in exported else _named(context, name)[0] for name in names}
    return [each for each in found if not names or wanted & set(each.names)]


def _named(context: Context, name: str) -> tuple[str, str]:
    """Return the name and the path of a volume, or of a group."""
    if name in context.configuration.groups:
        return name, context.configuration.groups[name].root
    if "/" not in name:
        configured = context.configuration.volume(name)
        return configured.name, configured.path
    for configured in context.configuration.volumes.values():
        if configured.path == name:
            return configured.name, name
    return default_name(name), os.path.abspath(name)  # noqa: PTH100  # not resolved, as in Volume.discover


def _refuse_twins(request: Request) -> None:
    """Refuse two volumes of one name."""
    names = request.note.names
    twins = {name for name in names if names.count(name) > 1}
    if twins:
        raise UsageError(
            f"{', '.join(sorted(twins))}: two of them have that name", remedy="Give them names in the configuration."
        )


def _line(said: dict[str, Any], kind: str) -> str:
    new = said["bytes_used"] if kind == "image" and said["bytes_new"] else said["bytes_new"]
    line = f"{said['name']}: {said['content']}, {decimal(said['bytes_used'])} in use, {decimal(new)} to read anew"
    return f"{line}\n  {said['tier_reason']}" if said["tier_reason"] else line


def _read(said: dict[str, Any]) -> str:
    return f"{decimal(said['bytes_read'])} were read" if "bytes_read" in said else "broken off before"
