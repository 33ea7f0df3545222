"""`blockferry systemd`: the units of all that runs by itself."""

from __future__ import annotations

from pathlib import Path

import click

from blockferry.cli.context import Context, Decorated, json_option
from blockferry.config.configuration import USUAL
from blockferry.systemd import units


def _root_option(function: Decorated) -> Decorated:
    """Add `--root`."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path, file_okay=False),
        help="Below this directory: for an image or a package.",
    )(function)


@click.group()
def systemd() -> None:
    """The units of all that runs by itself."""


@systemd.command()
@_root_option
@click.option("--borgmatic", is_flag=True, help="Also let borgmatic's own unit reach volumes.")
@json_option
@click.pass_obj
def install(context: Context, root: Path | None, borgmatic: bool) -> None:
    """Write the templates of units, and what makes directories at boot; nothing is started.

    Timers of groups are written by `schedule install`, udev's rule by `udev install`, and their units too.

    \b
    Example:
      blockferry systemd install
    """
    file = context.configuration.file
    written = units.install(root, "" if root or file == USUAL else file, borgmatic=borgmatic)
    context.output.result({"version": 1, "files": list(map(str, written))}, lambda: "\n".join(map(str, written)))


@systemd.command()
@_root_option
@json_option
@click.pass_obj
def remove(context: Context, root: Path | None) -> None:
    """Remove what `install` wrote. What runs goes on.

    \b
    Example:
      blockferry systemd remove
    """
    removed = units.remove(root)

    def sentence() -> str:
        return "\n".join(f"removed {path}" for path in removed) or "there was nothing to remove"

    context.output.result({"version": 1, "removed": list(map(str, removed))}, sentence)
