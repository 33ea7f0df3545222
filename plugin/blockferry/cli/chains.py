"""`blockferry merge`, `apply-log` and `delete`: what becomes of snapshots that lie on one another."""

from __future__ import annotations

import click
from rich.filesize import decimal

from blockferry import chain as chains
from blockferry import merge as road
from blockferry.cli import completion as complete
from blockferry.cli.afterwards import forget
from blockferry.cli.context import Context, json_option, log_repository_option, repository_option
from blockferry.cli.output import log
from blockferry.errors import BlockferryError
from blockferry.repository import Repository
from blockferry.snapshot import find


@click.command()
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...", shell_complete=complete.snapshots)
@repository_option
@log_repository_option
@json_option
@click.pass_obj
def merge(context: Context, snapshots: tuple[str, ...], reference: str | None, log_reference: str | None) -> None:
    """Make one whole snapshot of a part and all that it lies on, or of a set.

    The newest SNAPSHOT is the one whose state of the volume is kept; others have to be among what it lies on, and
    need not be named. Nothing is deleted.

    \b
    Example:
      blockferry merge latest --repo borg:/srv/borg
    """
    with context.repository(reference, log_reference) as repository:
        listed = repository.snapshots()
        done = road.merge(repository, [find(listed, each) for each in snapshots], context.output)
        _remember(context, repository, done)
    context.output.result(
        done.as_json(),
        lambda: (
            f"snapshot {done.snapshot.id} is {', '.join(done.merged)} in one: read {decimal(done.bytes_read)}, "
            f"stored {decimal(done.bytes_stored)}, in {done.seconds:.1f} s"
        ),
    )


@click.command(name="apply-log")
@click.argument("snapshot", shell_complete=complete.snapshots)
@repository_option
@log_repository_option
@json_option
@click.pass_obj
def apply_log(context: Context, snapshot: str, reference: str | None, log_reference: str | None) -> None:
    """Write the log of the set SNAPSHOT over its copy of the volume: the set becomes one whole snapshot.

    Whether the log belongs to the copy is checked before. Nothing is deleted.

    \b
    Example:
      blockferry apply-log latest --repo borg:/srv/borg
    """
    with context.repository(reference, log_reference) as repository:
        done = road.apply_log(repository, find(repository.snapshots(), snapshot), context.output)
        _remember(context, repository, done)
    context.output.result(
        done.as_json(),
        lambda: (
            f"snapshot {done.snapshot.id} is the copy of {', '.join(done.merged)} with its log over it: "
            f"read {decimal(done.bytes_read)}, stored {decimal(done.bytes_stored)}, in {done.seconds:.1f} s"
        ),
    )


def _remember(context: Context, repository: Repository, done: road.Merged) -> None:
    """Put a merged snapshot into the catalog, which is no more than an index."""
    try:
        with context.catalog() as catalog:
            catalog.add(repository.reference, done.snapshot, done.record, done.as_json())
    except BlockferryError as error:
        log.warning("%s", error)


@click.command()
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...", shell_complete=complete.snapshots)
@repository_option
@log_repository_option
@json_option
@click.pass_obj
def delete(context: Context, snapshots: tuple[str, ...], reference: str | None, log_reference: str | None) -> None:
    """Remove snapshots from a repository, sets with their shares. One that others still need is refused.

    Space is freed by the repository's own tool: `borg compact`, `restic prune`.

    \b
    Example:
      blockferry delete 3f9c0a11b2d4 --repo borg:/srv/borg
    """
    with context.repository(reference, log_reference) as repository:
        listed = repository.snapshots()
        named = [find(listed, name, shares=True) for name in snapshots]
        victims = list({each.id: each for each in named}.values())
        chains.delete(repository, victims)
        forget(context, repository.reference, victims)
    gone = [each.id for each in victims]
    context.output.result({"version": 1, "deleted": gone}, lambda: f"deleted: {', '.join(gone)}")
