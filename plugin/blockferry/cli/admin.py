"""`blockferry doctor` and `catalog`: looking after the installation."""

from __future__ import annotations

import click

from blockferry.cli.context import Context, json_option, repository_option
from blockferry.cli.output import Listing
from blockferry.doctor import examine


@click.command()
@json_option
@click.pass_obj
def doctor(context: Context) -> int:
    """Say what is there, what is missing, and how to get it. Exits with 1 if a backup cannot work.

    \b
    Example:
      blockferry doctor
    """
    findings = examine(context.manager)

    def listing() -> Listing:
        rows = []
        for each in findings:
            if each.name.startswith("plugin blockferry."):
                continue  # built in: a person need not be told
            mark = "ok" if each.found else ("MISSING" if each.needed else "-")
            rows.append((mark, each.name, each.found or "not found", each.purpose, "" if each.found else each.remedy))
        return Listing(("", "what", "found", "for", "to get it"), rows)

    context.output.result({"version": 1, "findings": [each.as_json() for each in findings]}, listing)
    return int(any(each.needed and not each.found for each in findings))


@click.group()
def catalog() -> None:
    """The index of snapshots on this host."""


@catalog.command()
@repository_option
@json_option
@click.pass_obj
def rebuild(context: Context, reference: str | None) -> int:
    """Make the catalog again from what a repository holds.

    \b
    Example:
      blockferry catalog rebuild --repo borg:/srv/borg
    """
    with context.repository(reference) as repository, context.catalog() as index:
        count, damaged = index.rebuild(repository)

    def sentence() -> str:
        return "\n".join([f"{count} snapshots of {repository.reference} are in the catalog", *damaged])

    context.output.result({"version": 1, "snapshots": count, "damaged": damaged}, sentence)
    return 3 if damaged else 0
