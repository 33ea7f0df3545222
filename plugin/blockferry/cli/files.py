"""`blockferry files`: what is in a group's snapshot, and getting it back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.filesize import decimal

from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, repository_option
from blockferry.cli.output import log
from blockferry.errors import PartialError, UsageError
from blockferry.groups import listing
from blockferry.groups.files import Restored, restore_files
from blockferry.groups.in_place import bring_back_in_place
from blockferry.groups.names import shown
from blockferry.groups.stored import StoredGroup, open_group
from blockferry.groups.table import Rows
from blockferry.snapshot import find

_LINES = 1000
"""How many lines are written at a time."""
_MOST_NAMED = 3


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@repository_option
@click.option("--list", "only_list", is_flag=True, help="List the files.")
@click.option("--to", "destination", metavar="DIR", type=click.Path(path_type=Path), help="Bring them back below DIR.")
@click.option(
    "--in-place", "volume", metavar="VOLUME", help="Bring them back onto their blocks of an unmounted volume."
)
@click.option("--dry-run", is_flag=True, help="With --in-place: write nothing, and say what would be.")
@click.option("--force", is_flag=True, help="Replace files that are there already; take back what changed since.")
@json_option
@click.pass_obj
def files(
    context: Context,
    snapshot: str,
    patterns: tuple[str, ...],
    reference: str | None,
    only_list: bool,
    destination: Path | None,
    volume: str | None,
    dry_run: bool,
    force: bool,
) -> None:
    """List the files in SNAPSHOT of a group, or bring them back: all, or those that a PATTERN selects.

    A PATTERN is a path relative to the group's root, which selects all that is below it too, or a pattern as `borg
    extract` takes it. DIR is made if it is not there. Exits with 3 if anything is not as it was.

    With --in-place nothing but the blocks of these files is written to, and nothing at all unless every file still lies
    where it lay: a repair of files whose blocks went bad, on the ext4 or XFS VOLUME that the group is on.

    \b
    Examples:
      blockferry files latest --list --repo borg:/srv/borg
      blockferry files latest mail/inbox 'sh:**/*.odt' --to /var/tmp/back --repo borg:/srv/borg
    """
    if only_list + (destination is not None) + (volume is not None) != 1:
        remedy = "Say one of --list, --to DIR and --in-place VOLUME."
        raise UsageError("it is not said what to do with the files", remedy=remedy)
    if dry_run and volume is None:
        raise UsageError("--dry-run is for --in-place", remedy="See what there is with --list.")
    with context.repository(reference) as repository:
        group = open_group(repository, find(repository.snapshots(), snapshot))
        with contextlib.closing(group.image):
            rows = listing.select(group.table, patterns)
            if volume is not None:
                _in_place(context, group, rows, volume, force=force, dry_run=dry_run)
                return
            if destination is None:
                _list(context, group, rows)
                return
            began = time.monotonic()
            restored = restore_files(group, rows, destination, context.output, force=force)
    _tell(context, group, destination, restored, time.monotonic() - began)


def _list(context: Context, group: StoredGroup, rows: Rows) -> None:
    """Print the files, as they are found: there may be millions."""
    if not context.output.as_json:
        _print(listing.lines(group, rows))
        return
    head = f'{{"version": 1, "snapshot": {json.dumps(group.record.snapshot)}, "entries": ['
    found = (json.dumps(entry, sort_keys=True) for entry in listing.objects(group, rows))
    first = itertools.islice(found, 1)
    _print(itertools.chain([head], first, (f",{entry}" for entry in found), ["]}"]))


def _print(lines: Iterator[str]) -> None:
    while some := list(itertools.islice(lines, _LINES)):
        click.echo("\n".join(some))


def _in_place(context: Context, group: StoredGroup, rows: Rows, volume: str, *, force: bool, dry_run: bool) -> None:
    """Bring files back onto their blocks, and say what came of it."""
    began = time.monotonic()
    done = bring_back_in_place(context.manager, group, rows, volume, context.output, force=force, dry_run=dry_run)
    result = {
        "version": 1,
        "snapshot": group.record.snapshot,
        "target": volume,
        **dataclasses.asdict(done),
        "dry_run": dry_run,
        "seconds": round(time.monotonic() - began, 3),
    }
    unreadable = f", {decimal(done.bytes_unreadable)} of it could not be read" if done.bytes_unreadable else ""
    wrote = f"{decimal(done.bytes_written)} {'would be written' if dry_run else 'written'}{unreadable}"
    context.output.result(
        result,
        lambda: (
            f"snapshot {group.record.snapshot}: {done.files} files on {volume}: "
            f"{decimal(done.bytes_compared)} compared, {wrote}"
        ),
    )


def _tell(context: Context, group: StoredGroup, destination: Path, restored: Restored, seconds: float) -> None:
    """Say what came back, and raise PartialError if anything is not as it was."""
    problems = [(shown(problem.path) or ".", problem.what) for problem in restored.problems]
    result = {
        "version": 1,
        "snapshot": group.record.snapshot,
        "target": str(destination),
        "files": restored.files,
        "directories": restored.directories,
        "links": restored.links,
        "others": restored.others,
        "bytes_written": restored.bytes_written,
        "problems": [{"path": path, "problem": what} for path, what in problems],
        "seconds": round(seconds, 3),
    }
    context.output.result(
        result,
        lambda: (
            f"snapshot {group.record.snapshot}: {restored.files} files, {restored.directories} directories, "
            f"{restored.links + restored.others} links and others are in {destination}: "
            f"{decimal(restored.bytes_written)} written, in {seconds:.1f} s"
        ),
    )
    if problems:
        for path, what in problems[_MOST_NAMED:]:
            log.warning("%s: %s", path, what)
        named = "; ".join(f"{path}: {what}" for path, what in problems[:_MOST_NAMED])
        raise PartialError(
            f"{len(problems)} of the files are not as they were: {named}",
            remedy="All others are. Those that could not be read, or changed, may be in another snapshot.",
        )
