"""`blockferry track`: the process that notes what is written to a device, so that a backup need not look for it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from blockferry.changed.bpf import daemon, protocol
from blockferry.changed.bpf.device import numbers_of
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option
from blockferry.cli.output import Listing


@click.group()
def track() -> None:
    """Note what is written to a device, so that a backup reads no more than that."""


@track.command()
@click.argument("volume", shell_complete=complete.paths)
@click.option("--foreground", is_flag=True, help="Stay, until SIGTERM or `track stop`: for systemd.")
@json_option
@click.pass_obj
def start(context: Context, volume: str, foreground: bool) -> None:
    """Note what is written to VOLUME, a block device, from now on.

    Returns when that is so. What it knows ends with it, and with the next reboot; the first backup after that reads
    all that is in use.

    \b
    Example:
      blockferry track start /dev/vg/home
    """
    if foreground:
        daemon.serve(str(Path(volume).absolute()))
        return
    said = daemon.detach(str(Path(volume).absolute()))
    context.output.result({"version": 1, **said}, lambda: f"{volume}: tracked since {said['since']}")


@track.command()
@click.argument("volume", shell_complete=complete.paths)
@json_option
@click.pass_obj
def stop(context: Context, volume: str) -> None:
    """Note no more what is written to VOLUME, and forget what was.

    \b
    Example:
      blockferry track stop /dev/vg/home
    """
    said, _none = protocol.ask(numbers_of(volume), {"do": "stop"})
    context.output.result({"version": 1, **said}, lambda: f"{volume}: not tracked any more")


@track.command()
@click.argument("volume", required=False, shell_complete=complete.paths)
@json_option
@click.pass_obj
def status(context: Context, volume: str | None) -> int:
    """Say which devices are tracked, or how VOLUME is. Exits with 1 if VOLUME is not.

    \b
    Example:
      blockferry track status
    """
    found: list[dict[str, Any]] = []
    for numbers in [numbers_of(volume)] if volume else protocol.tracked():
        with contextlib.suppress(protocol.NotTrackedError):
            found.append(protocol.ask(numbers, {"do": "status"})[0])

    def listing() -> Listing:
        columns = ("volume", "device", "since", "checkpoints", "lost")
        return Listing(columns, [tuple(str(each[name]) for name in columns) for each in found])

    context.output.result({"version": 1, "tracked": found}, listing)
    return int(volume is not None and not found)
