"""`blockferry restore` and `verify`."""

from __future__ import annotations

import click
from rich.filesize import decimal

from blockferry import restore as road
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, log_repository_option, repository_option
from blockferry.snapshot import find
from blockferry.volume import Volume


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@click.argument("target", shell_complete=complete.paths)
@repository_option
@log_repository_option
@click.option("--delta", is_flag=True, help="Compare first, and write only the blocks that differ.")
@click.option("--force", is_flag=True, help="Overwrite a target that holds something.")
@json_option
@click.pass_obj
def restore(
    context: Context,
    snapshot: str,
    target: str,
    reference: str | None,
    log_reference: str | None,
    delta: bool,
    force: bool,
) -> None:
    """Write SNAPSHOT back to TARGET, a block device or an image file.

    A target that is in use or too small is refused; one that holds a filesystem or data only yields to --force.

    \b
    Example:
      blockferry restore latest /dev/sdb --repo borg:ssh://nas/./volumes
    """
    with context.repository(reference, log_reference) as repository:
        found = find(repository.snapshots(), snapshot)
        done = road.restore(
            context.manager, repository, found, target, delta=delta, force=force, progress=context.output
        )
    context.output.result(
        done.as_json(),
        lambda: (
            f"snapshot {done.snapshot} is on {done.target}: {decimal(done.bytes_written)} written of "
            f"{decimal(done.bytes_volume)}, in {done.seconds:.1f} s"
        ),
    )


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@repository_option
@log_repository_option
@click.option(
    "--against", metavar="VOLUME", shell_complete=complete.paths, help="Compare with this volume, byte for byte."
)
@json_option
@click.pass_obj
def verify(
    context: Context, snapshot: str, reference: str | None, log_reference: str | None, against: str | None
) -> None:
    """Read all of SNAPSHOT, and say whether the repository holds what its record says.

    \b
    Example:
      blockferry verify latest --repo restic:/srv/restic --against /dev/vg/home
    """
    volume = Volume.discover(against) if against else None
    with context.repository(reference, log_reference) as repository:
        found = find(repository.snapshots(), snapshot)
        result = road.verify(repository, found, volume, context.output)
    context.output.result(
        result,
        lambda: (
            f"snapshot {found.id}: {decimal(result['bytes_verified'])} read and authentic"
            + (f", equal to {against}" if against else "")
        ),
    )
