"""`blockferry prune`: which snapshots of a volume stay, by rules that borg and restic have as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from blockferry.cli.afterwards import forget
from blockferry.cli.context import Context, json_option, log_repository_option, repository_option
from blockferry.cli.output import Listing
from blockferry.errors import UsageError
from blockferry.retention import KEEPS, carry_out, look_over

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _keep_options(function: Decorated) -> Decorated:
    """Add `--keep-last`, `--keep-daily` and so on."""
    for rule in reversed(KEEPS):
        period = rule.removeprefix("keep_")
        what = "the newest N" if period == "last" else f"the newest of each {_EACH[period]}, for N of these"
        option = click.option(f"--{rule.replace('_', '-')}", type=click.IntRange(0), metavar="N", help=f"Keep {what}.")
        function = option(function)
    return function


_EACH = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


@click.command()
@click.argument("volumes", nargs=-1, required=True, metavar="NAME...")
@repository_option
@log_repository_option
@_keep_options
@click.option("--broken", "remove_broken", is_flag=True, help="Also remove what cannot be restored any more.")
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be removed.")
@json_option
@click.pass_obj
def prune(
    context: Context,
    /,
    volumes: tuple[str, ...],
    reference: str | None,
    log_reference: str | None,
    remove_broken: bool,
    dry_run: bool,
    **rules: int | None,
) -> None:
    """Remove old snapshots of the volumes or groups NAME..., each volume by itself.

    A snapshot stays if a rule keeps it, if it is the newest, or if one that stays lies on it. Shares that are left of
    sets which were never completed go.

    \b
    Example:
      blockferry prune vm.img --keep-daily 7 --keep-monthly 12 --repo borg:/srv/borg
    """
    keep = {rule: count for rule, count in rules.items() if count is not None}
    if not any(keep.values()):
        raise UsageError("no rule keeps anything", remedy="Say how many are to stay: --keep-last 7, for example.")
    told: list[dict[str, Any]] = []
    with context.repository(reference, log_reference) as repository:
        for volume in dict.fromkeys(volumes):
            pruning = look_over(repository, volume, keep)
            if not pruning.stay and not pruning.broken and not pruning.left_over:
                known = sorted({each.volume for each in repository.snapshots()})
                raise UsageError(f"{volume}: no snapshot is of that", remedy=f"There are: {', '.join(known)}.")
            gone = [*pruning.go, *pruning.left_over]
            if not dry_run:
                gone = carry_out(repository, pruning, remove_broken=remove_broken)
                forget(context, repository.reference, gone)
            told.append(
                {
                    "volume": volume,
                    "stay": [each.id for each in pruning.stay],
                    "removed": [each.id for each in gone],
                    "broken": dict(pruning.broken),
                }
            )

    def listing() -> Listing:
        rows = []
        for each in told:
            rows += [(each["volume"], name, "stays") for name in each["stay"]]
            rows += [(each["volume"], name, "would go" if dry_run else "removed") for name in each["removed"]]
            left = {name: why for name, why in each["broken"].items() if name not in each["removed"]}
            rows += [(each["volume"], name, f"broken: {why}") for name, why in left.items()]
        return Listing(("volume", "snapshot", ""), rows)

    context.output.result({"version": 1, "dry_run": dry_run, "volumes": told}, listing)
