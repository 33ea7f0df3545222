"""`blockferry merge` and `delete`: what becomes of snapshots that lie on one another."""

from __future__ import annotations

import click
from rich.filesize import decimal

from blockferry import chain as chains
from blockferry import merge as road
from blockferry.cli.context import Context, json_option, repository_option
from blockferry.cli.output import log
from blockferry.errors import BlockferryError
from blockferry.snapshot import find


@click.command()
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...")
@repository_option
@json_option
@click.pass_obj
def merge(context: Context, snapshots: tuple[str, ...], reference: str | None) -> None:
    """Make one whole snapshot of a part and all that it lies on.

    The newest SNAPSHOT is the one whose state of the volume is kept; others have to be among what it lies on, and
    need not be named. Nothing is deleted.

    \b
    Example:
      blockferry merge latest --repo borg:/srv/borg
    """
    with context.repository(reference) as repository:
        listed = repository.snapshots()
        done = road.merge(repository, [find(listed, each) for each in snapshots], context.output)
        try:
            with context.catalog() as catalog:
                catalog.add(repository.reference, done.snapshot, done.record, done.as_json())
        except BlockferryError as error:
            log.warning("%s", error)
    context.output.result(
        done.as_json(),
        lambda: (
            f"snapshot {done.snapshot.id} is {', '.join(done.merged)} in one: read {decimal(done.bytes_read)}, "
            f"stored {decimal(done.bytes_stored)}, in {done.seconds:.1f} s"
        ),
    )


@click.command()
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...")
@repository_option
@json_option
@click.pass_obj
def delete(context: Context, snapshots: tuple[str, ...], reference: str | None) -> None:
    """Remove snapshots from a repository. One that parts still need is refused.

    Space is freed by the repository's own tool: `borg compact`, `restic prune`.

    \b
    Example:
      blockferry delete 3f9c0a11b2d4 --repo borg:/srv/borg
    """
    with context.repository(reference) as repository:
        listed = repository.snapshots()
        victims = list({each.id: each for each in (find(listed, name) for name in snapshots)}.values())
        chains.delete(repository, victims)
        try:
            with context.catalog() as catalog:
                catalog.remove(repository.reference, victims)
        except BlockferryError as error:
            log.warning("%s", error)
    gone = [each.id for each in victims]
    context.output.result({"version": 1, "deleted": gone}, lambda: f"deleted: {', '.join(gone)}")
