"""`blockferry used`, `snapshots` and `show`: looking, without changing anything."""

from __future__ import annotations

import dataclasses
import time

import click
from rich.filesize import decimal

from blockferry.cli.context import Context, find, json_option, repository_option
from blockferry.cli.output import Listing
from blockferry.errors import BlockferryError
from blockferry.ladder import used_blocks
from blockferry.restore import describe_map
from blockferry.volume import Volume


@click.command()
@click.argument("volume")
@click.option("--extents/--no-extents", default=True, help="With --json: list the extents, or only their sum.")
@json_option
@click.pass_obj
def used(context: Context, volume: str, extents: bool) -> None:
    """List the blocks of VOLUME that are in use, and who says so.

    \b
    Example:
      blockferry used /dev/vg/home --json
    """
    found = Volume.discover(volume)
    manager = context.manager  # loading plugins is not what the seconds are of
    began = time.monotonic()
    blocks, tier, reason = used_blocks(manager, found)
    data: dict[str, object] = {
        "version": 1,
        "volume": found.path,
        "size": found.size,
        "block_size": found.block_size,
        "filesystem": found.filesystem,
        "method": blocks.method,
        "tier": tier.value,
        "tier_reason": reason,
        "used_bytes": blocks.extents.total,
        "seconds": round(time.monotonic() - began, 4),
    }
    if extents and context.output.as_json:
        data["extents"] = list(blocks.extents)

    def sentence() -> str:
        total, share = blocks.extents.total, 100 * blocks.extents.total / found.size
        first = (
            f"{found.path}: {decimal(total)} in use of {decimal(found.size)} ({share:.1f} %), "
            f"in {len(blocks.extents)} extents, by {blocks.method}"
        )
        return f"{first}\n  {reason}" if reason else first

    context.output.result(data, sentence)


@click.command()
@repository_option
@click.option("--volume", default="", help="Only snapshots of the volume of this name.")
@json_option
@click.pass_obj
def snapshots(context: Context, reference: str | None, volume: str) -> None:
    """List the snapshots in a repository, oldest first.

    \b
    Example:
      blockferry snapshots --repo restic:/srv/restic
    """
    with context.repository(reference) as repository:
        found = [each for each in repository.snapshots() if not volume or each.volume == volume]
        try:
            with context.catalog() as catalog:
                figures = catalog.statistics(repository.reference)
        except BlockferryError:
            figures = {}  # an index that is lost takes its figures with it, nothing else

    def listing() -> Listing:
        columns = ("snapshot", "volume", "created", "tier", "size", "stored", "archive")
        rows = []
        for each in found:
            stored = figures.get(each.id, {}).get("bytes_stored")
            grown = decimal(stored) if isinstance(stored, int) else "?"
            rows.append((each.id, each.volume, each.created, each.tier, decimal(each.size), grown, each.archive))
        return Listing(columns, rows)

    context.output.result(
        {"version": 1, "snapshots": [dataclasses.asdict(each) | {"run": figures.get(each.id)} for each in found]},
        listing,
    )


@click.command()
@click.argument("snapshot")
@repository_option
@json_option
@click.pass_obj
def show(context: Context, snapshot: str, reference: str | None) -> None:
    """Show what is known of a SNAPSHOT: its volume, how it was made, and its blocks.

    \b
    Example:
      blockferry show latest --repo borg:/srv/borg
    """
    with context.repository(reference) as repository:
        found = find(repository.snapshots(), snapshot)
        record, block_map = repository.describe(found)
    kinds = describe_map(block_map)
    data = dataclasses.asdict(record) | {"version": 1, "archive": found.archive, "bytes": kinds, "runs": len(block_map)}

    def listing() -> Listing:
        reason = f": {record.tier_reason}" if record.tier_reason else ""
        facts = {
            "snapshot": record.snapshot,
            "archive": found.archive,
            "volume": f"{record.volume} ({record.path} on {record.host})",
            "created": record.created,
            "size": f"{decimal(record.size)} ({record.size} bytes)",
            "filesystem": record.filesystem or "none known",
            "identity": ", ".join(f"{key} {text}" for key, text in sorted(record.identity.items())) or "none",
            "tier": f"{record.tier.value}, by {record.method}{reason}",
            "stability": f"{record.stability.value}, by {record.freeze}",
            "blocks": ", ".join(f"{decimal(total)} {kind}" for kind, total in kinds.items()),
            "unit": decimal(record.unit),
            "base": record.base or "none",
        }
        return Listing(("", ""), list(facts.items()))

    context.output.result(data, listing)
