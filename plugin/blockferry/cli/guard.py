"""`blockferry guard`: the write path in front of a volume that several hosts share."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from typing import Any

import click
from rich.filesize import decimal

from blockferry import service
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, index_option, json_option
from blockferry.cli.hot import parse_bytes
from blockferry.cli.output import Listing
from blockferry.cluster import daemon
from blockferry.cluster.daemon import Request
from blockferry.errors import BlockferryError, UsageError
from blockferry.hot.attachment import directory_of
from blockferry.volume import default_name


@click.group()
def guard() -> None:
    """Stand in front of a volume that several hosts share, so that it can be backed up as it is at one instant."""


@guard.command()
@click.argument("volume", shell_complete=complete.paths)
@index_option
@click.option("--name", default="", help="What the volume is called, the same on all hosts; else the end of its path.")
@click.option("--host", default="", help="What this host is called, as no other is; else its host name.")
@click.option(
    "--buffer",
    callback=parse_bytes,
    metavar="BYTES",
    help="Acknowledge so much before it is on VOLUME: where each host has a part of its own.",
)
@click.option(
    "--log-room",
    callback=functools.partial(parse_bytes, least=0),
    default="256M",
    show_default=True,
    metavar="BYTES",
    help="Make so much room for logs beforehand: they are written faster there.",
)
@click.option("--foreground", is_flag=True, help="Stay, until SIGTERM or `guard stop`: for systemd.")
@json_option
@click.pass_obj
def start(
    context: Context, volume: str, index: str, name: str, host: str, buffer: int | None, log_room: int, foreground: bool
) -> None:
    """Show VOLUME as a disk that all use of it on this host has to go through.

    Prints the device, which is mounted and written to in place of VOLUME. With device-mapper it leads straight to
    VOLUME outside of a backup; else what is written passes the guard.

    \b
    Example:
      blockferry guard start /dev/mapper/lun0 --index redis://10.0.0.5/0
    """
    request = Request(
        name=name or default_name(volume),
        volume=os.path.realpath(volume),
        index=index,
        host=host or socket.gethostname(),
        buffer=buffer or 0,
        log_room=log_room,
    )
    for each in (request.name, request.host):
        directory_of(each)  # refuses what cannot be a name
    if foreground:
        daemon.serve(request)
        return
    said = daemon.start(request)
    context.output.result({"version": 1, **said}, lambda: f"{said['name']}: use {said['device']} in place of {volume}")


@guard.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Although the disk is in use.")
@json_option
@click.pass_obj
def stop(context: Context, name: str, force: bool) -> None:
    """Take the disk NAME away. A backup that is under way is void then.

    \b
    Example:
      blockferry guard stop lun0
    """
    said: dict[str, Any] = {"name": name}
    is_known = False
    try:
        said = daemon.ask(name, {"do": "stop", "force": force})
        with contextlib.suppress(FileNotFoundError):
            service.wait_until_free(daemon.socket_path(name))
    except service.NobodyThereError as error:
        if not error.broken_off:
            raise UsageError(
                f"{name}: no guard of that name runs", remedy="`blockferry guard status` lists them."
            ) from None
        is_known = daemon.clear_away(name, force=force)

    def sentence() -> str:
        more = f"; no backup begins before: blockferry cluster forget {name} {socket.gethostname()}" if is_known else ""
        return f"{name}: nothing stands in front of it any more{more}"

    context.output.result({"version": 1, **said}, sentence)


@guard.command()
@click.argument("name", required=False)
@json_option
@click.pass_obj
def status(context: Context, name: str | None) -> int:
    """Say which guards run on this host, or how NAME is. Exits with 1 if NAME does not run.

    \b
    Example:
      blockferry guard status
    """
    found = []
    for each in [name] if name else daemon.running():
        try:
            found.append({"state": "running", **daemon.ask(each, {"do": "status"})})
        except service.NobodyThereError as error:
            if error.broken_off:
                found.append({"state": "killed", "name": each})
        except BlockferryError as error:
            found.append({"state": error.message, "name": each})

    def listing() -> Listing:
        columns = ("name", "host", "device", "volume", "path", "backup", "logged", "state")
        return Listing(columns, [_row(each) for each in found])

    context.output.result({"version": 1, "guards": found}, listing)
    return int(name is not None and [each["state"] for each in found] != ["running"])


def _row(said: dict[str, Any]) -> tuple[str, ...]:
    state = said["state"] + (f": {said['failure']}" if said.get("failure") else "")
    plain = tuple(str(said.get(key, "")) for key in ("name", "host", "device", "volume", "path", "stage"))
    return (*plain, decimal(said.get("bytes_logged", 0)), state)
