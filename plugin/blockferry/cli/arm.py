"""`blockferry arm`, `disarm`, `armed`, `watch` and `udev`: a hot restore that a device starts by showing up."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import click

from blockferry.chain import trace
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, repository_option
from blockferry.cli.hot import parse_bytes
from blockferry.cli.output import Listing
from blockferry.config.reference import TOOLS, absolute
from blockferry.errors import BlockferryError, PartialError, UsageError
from blockferry.groups.stored import refuse_group
from blockferry.hot import arming, attachment, client, showing_up
from blockferry.hot import udev as rules
from blockferry.hot import watch as watching
from blockferry.hot.arming import Armed, Match
from blockferry.snapshot import find
from blockferry.volume import default_name

log = logging.getLogger(__name__)

_VARIABLES = {"borg": "BORG_REPO", "restic": "RESTIC_REPOSITORY"}
_LONGEST_NAME = 64


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@click.argument("match")
@repository_option
@click.option("--name", default="", help="What to call the restore; else after the match.")
@click.option("--mount", "directory", default="", metavar="DIR", help="Mount the disk there as soon as it can be used.")
@click.option("--rate", callback=parse_bytes, metavar="BYTES", help="Bring in at most so many bytes a second: 20M.")
@json_option
@click.pass_obj
def arm(
    context: Context, snapshot: str, match: str, reference: str | None, name: str, directory: str, rate: int | None
) -> int:
    """Restore SNAPSHOT onto the device MATCH as soon as it shows up, or at once if it is here; hot, as `attach` does.

    MATCH is serial:VALUE, wwn:VALUE, path:VALUE or partuuid:VALUE: the ID_SERIAL_SHORT, ID_WWN, ID_PATH or
    ID_PART_ENTRY_UUID that `udevadm info` shows. A device that holds something, is in use or too small is refused.
    Exits with 3 if it is armed, but here and refused.

    \b
    Example:
      blockferry arm latest serial:WD-WX12A345 --repo borg:ssh://nas/./volumes --mount /srv
    """
    device = Match.parse(match)
    wanted = Armed(
        match=device,
        name=name or default_name(f"{device.kind}-{device.value}")[:_LONGEST_NAME],
        snapshot="",
        repository=_storable(context.reference(reference)),
        mount=_directory(directory),
        rate=rate,
    )
    wanted = _with_snapshot(context, wanted, snapshot)
    _refuse_a_name_in_use(wanted)
    arming.arm(wanted)
    if not rules.is_installed():
        log.warning("udev does not know of it: `blockferry udev install`, or keep `blockferry watch` running")
    said = _begin_if_here(wanted)
    context.output.result({"version": 1, **said}, lambda: _sentence(said))
    return PartialError.exit_code if said["refused"] else 0


@click.command()
@click.argument("match")
@json_option
@click.pass_obj
def disarm(context: Context, match: str) -> None:
    """Do nothing any more when the device MATCH shows up. A restore that has begun goes on until it is detached.

    \b
    Example:
      blockferry disarm serial:WD-WX12A345
    """
    device = Match.parse(match)
    if not arming.disarm(device):
        raise BlockferryError(f"{device}: is not armed", remedy="`blockferry armed` lists what is.")
    context.output.result({"version": 1, "match": str(device)}, lambda: f"{device}: disarmed")


@click.command()
@json_option
@click.pass_obj
def armed(context: Context) -> None:
    """List what is armed, and why the last try was refused if it was.

    \b
    Example:
      blockferry armed
    """
    found = [each.to_json() | {"state": _state(each)} for each in arming.load_all()]

    def listing() -> Listing:
        columns = ("match", "name", "snapshot", "repository", "mount", "state")
        return Listing(columns, [tuple(str(each[column]) for column in columns) for each in found])

    context.output.result({"version": 1, "armed": found}, listing)


@click.command()
@click.option("--once", is_flag=True, help="Begin with the devices that are here, and wait for no others.")
@json_option
@click.pass_obj
def watch(context: Context, once: bool) -> None:
    """Begin the restore of each armed device that shows up, until SIGTERM: for where systemd is not.

    \b
    Example:
      BORG_PASSCOMMAND="cat /root/passphrase" blockferry watch
    """
    for began in watching.watch(once=once):
        for said in began:
            context.output.result({"version": 1, **said}, functools.partial(_is_at, said))


@click.group()
def udev() -> None:
    """What udev and systemd need in order to begin restores."""


@udev.command()
@click.option("--root", type=click.Path(path_type=Path), help="Write below this directory: for an image or a package.")
@json_option
@click.pass_obj
def install(context: Context, root: Path | None) -> None:
    """Write udev's rule and systemd's unit, which begin the restore of an armed device that shows up.

    \b
    Example:
      blockferry udev install
    """
    written = rules.install(root)
    context.output.result({"version": 1, "files": list(map(str, written))}, lambda: "\n".join(map(str, written)))


@udev.command()
@click.argument("match")
@json_option
@click.pass_obj
def restore(context: Context, match: str) -> None:
    """Restore onto the armed device MATCH, until SIGTERM or `detach`: what systemd's unit runs.

    Exits with 75 if the same may go well later, as with a repository that does not answer.

    \b
    Example:
      blockferry udev restore serial:WD-WX12A345
    """
    device = Match.parse(match)
    showing_up.serve(device)
    context.output.result({"version": 1, "match": str(device)}, lambda: f"{device}: the restore has ended")


def _with_snapshot(context: Context, wanted: Armed, snapshot: str) -> Armed:
    """Return what is wanted with the snapshot's whole id: what cannot be restored is found out now."""
    with context.repository(wanted.repository) as repository:
        listed = repository.snapshots()
        found = find(listed, snapshot)
        refuse_group(trace(repository, found, listed).newest.record)
        return dataclasses.replace(wanted, snapshot=found.id)


def _refuse_a_name_in_use(wanted: Armed) -> None:
    """Raise UsageError if another restore has the name; what is known of one that is complete and over is forgotten."""
    known = attachment.load(wanted.name)
    if known is None:
        return
    if known.finished and wanted.name not in client.running():
        known.forget()
    elif known.finished or known.snapshot != wanted.snapshot:
        state = "complete, and not detached" if known.finished else "not complete"
        raise UsageError(
            f"{wanted.name}: its restore of snapshot {known.snapshot} onto {known.target} is {state}",
            remedy=f"Give this one another --name, or end that one: blockferry detach --forget {wanted.name}",
        )


def _storable(reference: str) -> str:
    """Return a reference as it is understood from any directory and in another environment.

    Raise UsageError if it cannot be kept: it holds a password.
    """
    tool, separator, where = reference.partition(":")
    if tool in TOOLS:
        return absolute(reference)
    where = where or os.environ.get(_VARIABLES.get(tool, ""), "")
    if not where:
        raise UsageError(
            f"{reference}: names no repository", remedy="Say --repo borg:PATH-OR-URL or restic:PATH-OR-URL."
        )
    if re.search(r"://[^/@\s]*:[^/\s]*@", where):
        raise UsageError(
            "the repository's URL holds a password, which is not kept",
            remedy="Put it into /etc/blockferry/environment, as RESTIC_REST_PASSWORD=...; for ssh use a key.",
        )
    local = re.match(r"local:|", where)
    prefix = local[0] if local else ""
    path = where.removeprefix(prefix)
    whole = os.path.abspath(path) if os.path.exists(path) else path  # noqa: PTH100, PTH110  # a link stays one
    return f"{tool}{separator}{prefix}{whole}"


def _directory(given: str) -> str:
    """Return a directory to mount at; raise UsageError if it is not there."""
    path = os.path.realpath(given) if given else ""
    if path and not Path(path).is_dir():
        raise UsageError(f"{given}: is not a directory", remedy=f"Make it: mkdir -p {path}")
    return path


def _begin_if_here(wanted: Armed) -> dict[str, Any]:
    """Begin if the device is here; return what is armed, the `device` of the disk and why it was refused."""
    said: dict[str, Any] = wanted.to_json() | {"device": "", "state": _state(wanted)}
    if not rules.devices_of(wanted.match):
        return said
    try:
        began = showing_up.begin(wanted)
    except BlockferryError as error:
        log.error("%s: is here already, and refused: %s", wanted.match, error)
        return said | {"refused": error.message, "state": "refused"}
    return said | {"device": began["device"], "state": "begun"}


def _state(each: Armed) -> str:
    if each.name in client.running():
        return "begun"
    return f"refused: {each.refused}" if each.refused else "waiting"


def _is_at(said: dict[str, Any]) -> str:
    return f"{said['name']}: snapshot {said['snapshot']} is at {said['device']}"


def _sentence(said: dict[str, Any]) -> str:
    match = said["match"]
    if said["refused"]:
        return f"{match}: armed; the device is here already, and refused: {said['refused']}"
    if said["device"]:
        return f"{match}: is here already: snapshot {said['snapshot']} is at {said['device']}"
    return f"{match}: armed: snapshot {said['snapshot']} goes onto it as soon as it shows up"
