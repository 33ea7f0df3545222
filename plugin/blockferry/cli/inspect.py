"""`blockferry used`, `changed`, `snapshots` and `show`: looking, without changing anything."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.filesize import decimal

from blockferry.chain import broken, trace
from blockferry.checkpoints import Checkpoints
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, log_repository_option, repository_option
from blockferry.cli.output import Listing
from blockferry.difference import LATEST, Choice, find_difference
from blockferry.errors import BlockferryError, DamagedSnapshotError
from blockferry.ladder import used_blocks
from blockferry.picture import Shade, shades_of_chain, shades_of_map
from blockferry.restore import describe_map
from blockferry.sets import incomplete, without_shares
from blockferry.snapshot import Snapshot, find, now
from blockferry.volume import Volume

_MOST_SHARES = 8


@click.command()
@click.argument("volume", shell_complete=complete.paths)
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
@log_repository_option
@click.option("--volume", default="", help="Only snapshots of the volume of this name.")
@click.option("--all", "everything", is_flag=True, help="Also what is left of sets that were never completed.")
@json_option
@click.pass_obj
def snapshots(
    context: Context, reference: str | None, log_reference: str | None, volume: str, everything: bool
) -> None:
    """List the snapshots in a repository, oldest first.

    \b
    Example:
      blockferry snapshots --repo restic:/srv/restic
    """
    with context.repository(reference, log_reference) as repository:
        listed = repository.snapshots()
        left_over = incomplete(listed, now())
        shown = [*without_shares(listed), *(left_over if everything else [])]
        found = [each for each in listed if each in shown and volume in ("", each.volume)]
        lost = broken(repository, listed)
        try:
            with context.catalog() as catalog:
                figures = catalog.statistics(repository.reference)
        except BlockferryError:
            figures = {}  # an index that is lost takes its figures with it, nothing else

    def listing() -> Listing:
        columns = ("snapshot", "volume", "created", "tier", "on top of", "size", "stored", "archive")
        rows = []
        for each in found:
            stored = figures.get(each.id, {}).get("bytes_stored")
            grown = decimal(stored) if isinstance(stored, int) else "?"
            size = decimal(each.size)
            below = f"broken: {lost[each.id]}" if each.id in lost else _below(each)
            rows.append((each.id, each.volume, each.created[:19], each.tier, below, size, grown, each.archive))
        return Listing(columns, rows)

    told = [
        dataclasses.asdict(each)
        | {"incomplete": each.share_of is not None, "broken": lost.get(each.id), "run": figures.get(each.id)}
        for each in found
    ]
    context.output.result({"version": 1, "snapshots": told}, listing)


def _below(snapshot: Snapshot) -> str:
    """Return what a snapshot lies on, for a person to read."""
    if snapshot.share_of is not None:
        return f"incomplete: of {snapshot.share_of}"
    if snapshot.closing:
        return "its shares"
    return (snapshot.base or "") if snapshot.part else ""


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@repository_option
@log_repository_option
@click.option(
    "--map", "drawing", metavar="FILE", type=click.Path(path_type=Path), help="Also draw its blocks there, as SVG."
)
@json_option
@click.pass_obj
def show(
    context: Context, snapshot: str, reference: str | None, log_reference: str | None, drawing: Path | None
) -> None:
    """Show what is known of a SNAPSHOT: its volume, how it was made, and its blocks.

    \b
    Examples:
      blockferry show latest --repo borg:/srv/borg
      blockferry show latest --repo borg:/srv/borg --map blocks.svg
    """
    shares: list[str] = []
    shades: list[Shade] | None = None
    with context.repository(reference, log_reference) as repository:
        listed = repository.snapshots()
        found = find(listed, snapshot)
        record, block_map = repository.describe(found)
        try:
            traced = trace(repository, found, listed)
            chain = [link.snapshot.id for link in traced.states]
            shares = [link.snapshot.id for link in traced.shares]
            shades = shades_of_chain(traced) if drawing else None
        except DamagedSnapshotError as error:
            chain, record = [found.id], dataclasses.replace(record, tier_reason=error.message)
    kinds = describe_map(block_map)
    data = dataclasses.asdict(record) | {"version": 1, "archive": found.archive, "bytes": kinds, "runs": len(block_map)}
    data["chain"] = chain
    if drawing:
        from blockferry.cli.drawing import draw  # noqa: PLC0415  # few ask for it

        draw(record, shades_of_map(block_map) if shades is None else shades, drawing)
        data["map"] = str(drawing)

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
            "base": f"{record.base}, changes by {record.tracker}" if record.base else "none",
            "lies on": ", ".join([*chain[1:], *_few(shares)]) or "nothing: it is whole",
            "trackers": ", ".join(sorted(record.checkpoints)) or "none",
        }
        if drawing:
            facts["map"] = str(drawing)
        return Listing(("", ""), list(facts.items()))

    context.output.result(data, listing)


def _few(shares: Sequence[str]) -> list[str]:
    """Return the first of some shares, and how many more there are, for a person to read."""
    more = [f"{len(shares) - _MOST_SHARES} more"] if len(shares) > _MOST_SHARES else []
    return [f"share {each}" for each in shares[:_MOST_SHARES]] + more


@click.command()
@click.argument("volume", shell_complete=complete.paths)
@repository_option
@click.option(
    "--since",
    metavar="SNAPSHOT",
    default=LATEST,
    shell_complete=complete.snapshots,
    help="The snapshot to start at; `latest` is the default.",
)
@click.option("--name", default="", help="The volume's name in the repository; else the end of its path.")
@click.option("--tracker", default="", metavar="NAME", help="Ask only this tracker.")
@json_option
@click.pass_obj
def changed(context: Context, volume: str, reference: str | None, since: str, name: str, tracker: str) -> None:
    """List the blocks of VOLUME that changed since a snapshot, and who says so. Exits with 1 if nobody can.

    \b
    Example:
      blockferry changed /srv/vm.img --repo restic:/srv/restic --since latest
    """
    found = Volume.discover(volume, name)
    with context.repository(reference) as repository:
        checkpoints = Checkpoints(context.manager)
        choice = Choice(since=since, tracker=tracker)
        difference, reason = find_difference(context.manager, checkpoints, repository, found, found, choice)
    if difference is None:
        raise BlockferryError(f"{volume}: {reason}", remedy="A backup reads every block in use.")
    extents = difference.changed.extents.clip(0, found.size)
    data = {
        "version": 1,
        "volume": found.path,
        "since": difference.chain.newest.snapshot.id,
        "method": difference.changed.method,
        "remark": difference.remark,
        "changed_bytes": extents.total,
        "extents": list(extents) if context.output.as_json else [],
    }

    def sentence() -> str:
        first = (
            f"{found.path}: {decimal(extents.total)} changed since snapshot {data['since']}, "
            f"in {len(extents)} extents, by {data['method']}"
        )
        return f"{first}\n  {difference.remark}" if difference.remark else first

    context.output.result(data, sentence)
