"""`blockferry mount`: a group's files, to look into without bringing them back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, repository_option
from blockferry.errors import TargetError
from blockferry.fuse import mounted_on
from blockferry.groups.stored import open_group
from blockferry.groups.tree import GroupTree
from blockferry.snapshot import find


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@click.argument("directory", type=click.Path(path_type=Path))
@repository_option
@json_option
@click.pass_obj
def mount(context: Context, snapshot: str, directory: Path, reference: str | None) -> None:
    """Show the files in SNAPSHOT of a group at DIRECTORY, read-only, until Ctrl-C or `umount DIRECTORY`.

    What is read is fetched then. Under root other users see the files as well, as far as their modes let them.

    \b
    Example:
      blockferry mount latest /mnt --repo borg:/srv/borg
    """
    place = directory.absolute()
    if not place.is_dir():
        raise TargetError(f"{directory}: not a directory", remedy="Make an empty one to mount on.")
    with context.repository(reference) as repository:
        group = open_group(repository, find(repository.snapshots(), snapshot))
        with contextlib.closing(group.image), mounted_on(GroupTree(group), place) as server:
            told = {"version": 1, "snapshot": group.record.snapshot, "path": str(place)}
            context.output.result(
                told, lambda: f"snapshot {group.record.snapshot} is at {place}; Ctrl-C or umount ends it"
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.join()
