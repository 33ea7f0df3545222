"""What is done once a snapshot is stored or gone: the catalog, old snapshots. A failure costs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from blockferry.backup import Result
from blockferry.cli.context import Context
from blockferry.cli.output import log
from blockferry.errors import BlockferryError
from blockferry.repository import Repository
from blockferry.retention import carry_out, look_over
from blockferry.snapshot import Snapshot

if TYPE_CHECKING:
    from blockferry.cluster.backup import SharedResult


def remember(context: Context, reference: str, result: Result | SharedResult) -> None:
    """Put a snapshot into the catalog; a catalog that cannot be written costs nothing but itself."""
    try:
        with context.catalog() as catalog:
            catalog.add(reference, result.snapshot, result.record, result.as_json())
    except BlockferryError as error:
        log.warning("%s", error)


def thin_out(context: Context, repository: Repository, volume: str, keep: Mapping[str, int]) -> None:
    """Remove the snapshots of a volume that its rules do not keep; a failure costs space, not the backup."""
    try:
        if keep and (gone := carry_out(repository, look_over(repository, volume, keep))):
            log.info("%s: removed %s", volume, ", ".join(each.id for each in gone))
            forget(context, repository.reference, gone)
    except BlockferryError as error:
        log.warning("%s: old snapshots are still there: %s", volume, error)


def forget(context: Context, reference: str, gone: Sequence[Snapshot]) -> None:
    """Take snapshots out of the catalog, as far as that can be written."""
    try:
        with context.catalog() as catalog:
            catalog.remove(reference, gone)
    except BlockferryError as error:
        log.warning("%s", error)
