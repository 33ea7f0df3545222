"""Backups of groups: what `blockferry backup` does with a group, and `blockferry group`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.filesize import decimal

from blockferry.cli import completion as complete
from blockferry.cli.afterwards import remember, thin_out
from blockferry.cli.context import Context, json_option
from blockferry.config.reference import is_foreign
from blockferry.errors import BlockferryError, PartialError
from blockferry.extents import ExtentSet
from blockferry.forecast import Forecast
from blockferry.groups.backup import GroupResult, back_up_groups
from blockferry.groups.definition import Group
from blockferry.groups.forecast import forecast
from blockferry.groups.packing import own_pieces
from blockferry.groups.place import Filesystem
from blockferry.groups.schedule import due, last_runs, record_run
from blockferry.groups.scope import Scope
from blockferry.groups.table import BESIDE
from blockferry.groups.walk import Walker
from blockferry.manager import mask, repository_named
from blockferry.repository import Repository

_MOST_SHOWN = 20


def back_up_due(context: Context, *, job: bool) -> None:
    """Back up the groups whose time has come; those on one filesystem in one go."""
    groups = due(context.configuration.groups.values(), last_runs(), datetime.datetime.now(datetime.UTC))
    done: list[dict[str, Any]] = []
    errors: list[BlockferryError] = []
    for together in _by_filesystem(groups):
        try:
            done += [result.as_json() for result in back_up(context, together, None, "latest", job=job)]
        except BlockferryError as error:
            errors.append(error)
            done += [{"group": group.name, "error": error.message} for group in together]
    context.output.result({"version": 1, "groups": done}, lambda: "\n".join(map(_line, done)) or "no group is due")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BlockferryError("; ".join(error.message for error in errors))
    context.complain()
    _complain([problem["path"] for each in done for problem in each.get("problems", [])])


def back_up_one(context: Context, group: Group, reference: str | None, since: str, *, job: bool) -> None:
    """Back up a group that was named."""
    (result,) = back_up(context, [group], reference, since, job=job)
    context.output.result(result.as_json(), lambda: _sentence(result))
    context.complain()
    _complain([os.fsdecode(path) for path, _reason in result.problems])


def foresee(context: Context, group: Group, reference: str | None, since: str) -> Forecast:
    """Return what a backup of a group would do."""
    with context.repository(reference or group.repository) as repository:
        return forecast(context.manager, group, repository, since=since, progress=context.output)


def back_up(
    context: Context, groups: Sequence[Group], reference: str | None, since: str, *, job: bool
) -> list[GroupResult]:
    """Back up groups that are on one filesystem, and remember whether they ran.

    With `job` each whose repository another tool's file names is backed up within a job of that tool's.
    """
    named = {each.name: context.reference(reference or each.repository) for each in groups}
    own = [each for each in groups if job and is_foreign(named[each.name])]
    results: list[GroupResult] = []
    for group in own:

        def store(repository: Repository, group: Group = group) -> list[GroupResult]:
            return list(_stored(context, [(group, repository)], since))

        began = datetime.datetime.now(datetime.UTC)
        try:
            results += context.back_up(named[group.name], group.name, store, job=True)
        except BaseException:
            record_run(group.name, began, ok=False)
            raise
    return results + _back_up_together(context, [(each, named[each.name]) for each in groups if each not in own], since)


def _back_up_together(context: Context, groups: Sequence[tuple[Group, str]], since: str) -> list[GroupResult]:
    """Back up groups, each to the repository of that reference; plugins learn of those that fail."""
    began = datetime.datetime.now(datetime.UTC)
    results: list[GroupResult] = []
    repositories: dict[str, Repository] = {}
    try:
        with contextlib.ExitStack() as opened:
            for _group, named in groups:
                if named not in repositories:
                    repository = repository_named(context.manager, named)
                    repositories[named] = opened.enter_context(contextlib.closing(repository))
            wanted = [(group, repositories[named]) for group, named in groups]
            results.extend(_stored(context, wanted, since))
    except BaseException as error:
        for group, named in groups[len(results) :]:
            record_run(group.name, began, ok=False)
            where = repositories[named].reference if named in repositories else mask(named)
            context.tell_failure(group.name, where, error)
        raise
    return results


def _stored(context: Context, wanted: Sequence[tuple[Group, Repository]], since: str) -> Iterator[GroupResult]:
    """Yield what became of groups, one after the other, and remove what their rules do not keep."""
    began = datetime.datetime.now(datetime.UTC)
    if not wanted:
        return
    done = back_up_groups(context.manager, wanted, since=since, progress=context.output)
    for (group, repository), result in zip(wanted, done, strict=True):
        stored = result.result
        context.manager.hook.blockferry_snapshot_stored(
            snapshot=stored.snapshot, record=stored.record, statistics=result.as_json()
        )
        remember(context, repository.reference, stored)
        record_run(group.name, began, ok=True)
        thin_out(context, repository, group.name, group.keep)
        yield result


def _by_filesystem(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups that are on one filesystem together; one whose root is gone is by itself."""
    found: dict[object, list[Group]] = {}
    for group in groups:
        try:
            key: object = os.stat(group.root).st_dev
        except OSError:
            key = group.name
        found.setdefault(key, []).append(group)
    return list(found.values())


def _complain(paths: list[str]) -> None:
    """Raise PartialError if files are not stored as they should be."""
    if paths:
        shown = [path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for path in paths]
        rest = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        raise PartialError(
            f"{len(shown)} files are not stored as they should be: {', '.join(shown[:_MOST_SHOWN])}{rest}",
            remedy="Everything else is. `--json` gives the reasons; a later run may find them at rest.",
        )


def _line(each: dict[str, Any]) -> str:
    if "error" in each:
        return f"{each['group']}: {each['error']}"
    sizes = f"{decimal(each['bytes_used'])}, {decimal(each['bytes_changed'])} of it new"
    return f"{each['group']}: snapshot {each['snapshot']}, {each['entries']} entries, {sizes}"


def _sentence(result: GroupResult) -> str:
    done, record = result.result, result.result.record
    first = (
        f"snapshot {done.snapshot.id} of the group {record.volume}: {result.entries} entries, "
        f"{decimal(record.bytes_used)}, {decimal(record.bytes_changed)} of it new, "
        f"read {decimal(done.bytes_read)}, stored {decimal(done.bytes_stored)}, in {done.seconds:.1f} s"
    )
    lines = [
        first,
        f"  by {record.method}" + (f"; changes since snapshot {record.base}" if record.base else ""),
    ]
    return "\n".join([*lines, f"  {record.tier_reason}"] if record.tier_reason else lines)


@click.command()
@click.argument("name", shell_complete=complete.groups)
@click.option("--extents", is_flag=True, help="With --json: list the extents on the volume, [start, length] each.")
@json_option
@click.pass_obj
def group(context: Context, name: str, extents: bool) -> None:
    """Say how many files the group NAME has, and in how many pieces they lie.

    \b
    Example:
      blockferry group mail
    """
    found = context.configuration.group(name)
    filesystem = Filesystem.of(context.manager, os.fsencode(found.root))
    with (
        Walker(Scope.of(found), filesystem.contents, None) as walker,
        context.output.count("files and directories") as advance,
    ):
        walked = walker.walk(advance)
    _rows, pieces = own_pieces(walked)
    on_disk = pieces[pieces["address"] != BESIDE]
    disk = ExtentSet.from_ranges(on_disk["address"], on_disk["address"] + on_disk["length"])
    beside = int(pieces["length"].sum()) - int(on_disk["length"].sum())
    data = {
        "version": 1,
        "name": name,
        "root": found.root,
        "filesystem": filesystem.type,
        "device": filesystem.volume.path if filesystem.volume else "",
        "entries": int(walked.entries.size),
        "bytes": disk.total + beside,
        "beside_bytes": beside,
        "extent_count": len(disk),
        "reads": len(disk.coalesce(64 << 10)),
        "reason": filesystem.reason,
        "problems": [{"path": os.fsdecode(path), "reason": reason} for path, reason in walked.problems],
    }
    if extents and context.output.as_json:
        data["extents"] = list(disk)

    def sentence() -> str:
        first = (
            f"{name}: {walked.entries.size} entries below {found.root}, {decimal(disk.total + beside)} "
            f"in {len(disk)} extents, to be read in {len(disk.coalesce(64 << 10))} sweeps"
        )
        return f"{first}\n  {filesystem.reason}" if filesystem.reason else first

    context.output.result(data, sentence)
