"""`blockferry config generate`: what to paste into the configuration of borgmatic, resticprofile or autorestic."""

from __future__ import annotations

import os

import click

from blockferry.cli.context import Context, json_option
from blockferry.config.configuration import USUAL
from blockferry.config.generate import TOOLS, Wanted, snippet
from blockferry.export.client import usual_directory
from blockferry.systemd import own_command


@click.command()
@click.argument("tool", type=click.Choice(sorted(TOOLS)))
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--at", metavar="DIR", help="The directory, as for `export`; it is made if it is not there.")
@click.option(
    "--as", "kind", type=click.Choice(["segments", "image"]), default="segments", show_default=True, help="As `export`."
)
@json_option
@click.pass_obj
def generate(context: Context, tool: str, names: tuple[str, ...], at: str | None, kind: str) -> None:
    """Print what a job of TOOL needs so that NAME is exported for it, and released after it.

    NAME is a volume or a group of files of the configuration. Nothing is changed but that the directory is there from
    now on: a job's dry run looks for it.

    \b
    Example:
      blockferry config generate borgmatic home
    """
    configuration = context.configuration
    if at:
        os.makedirs(at, mode=0o700, exist_ok=True)  # noqa: PTH103  # as the user names it
    wanted = Wanted(
        names=list(dict.fromkeys(names)),
        volumes=[configuration.volume(name) for name in names if name not in configuration.groups],
        groups=[configuration.groups[name] for name in names if name in configuration.groups],
        at=os.path.realpath(at) if at else usual_directory(),
        usual=not at,
        kind=kind,
        command=own_command(),
        config=os.path.abspath(configuration.file) if configuration.file != USUAL else "",  # noqa: PTH100
    )
    text = snippet(tool, wanted)
    context.output.result({"version": 1, "tool": tool, "at": wanted.at, "text": text}, lambda: text.rstrip("\n"))
