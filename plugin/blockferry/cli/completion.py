"""`blockferry completion`: what a shell can complete, and the script with which it asks.

Whatever is completed is asked of files of this host. A repository is never opened for it: of snapshots those are
offered that the catalog knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from blockferry.catalog import Catalog
from blockferry.cli.context import Context, json_option
from blockferry.config.configuration import Configuration, load_configuration
from blockferry.difference import LATEST, NONE
from blockferry.errors import BlockferryError
from blockferry.hot import attachment
from blockferry.manager import plugin_manager
from blockferry.state import state_directory

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_BLOCKFERRY_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@json_option
@click.pass_obj
def completion(context: Context, shell: str) -> None:
    """Print what SHELL has to read in order to complete commands, options, and the names in the configuration.

    \b
    Examples:
      blockferry completion bash >/etc/bash_completion.d/blockferry
      blockferry completion zsh >/usr/local/share/zsh/site-functions/_blockferry
      blockferry completion fish >/etc/fish/completions/blockferry.fish
    """
    text = script(shell)
    context.output.result({"version": 1, "shell": shell, "script": text}, lambda: text.rstrip("\n"))


def script(shell: str) -> str:
    """Return the script for a shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"click knows no shell {shell}")
    # The source of the base class: that of bash runs bash, to see whether it is new enough.
    return ShellComplete.source(kind(click.Command("blockferry"), {}, "blockferry", _VARIABLE)).strip() + "\n"


def paths(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def _names(listed: Callable[[click.Context], Iterable[tuple[str, str]]], *, or_paths: bool = False) -> Complete:
    """Return what completes names, each with a word on what it is."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = [CompletionItem(name, help=what) for name, what in listed(context) if name.startswith(incomplete)]
        except (BlockferryError, OSError):
            found = []  # a shell that completes is not where anybody looks for errors
        return [*(paths(context, parameter, incomplete) if or_paths else []), *found]

    return complete


def _configuration(context: click.Context) -> Configuration:
    return load_configuration(plugin_manager(), context.find_root().params.get("config"))


def _groups(context: click.Context) -> Iterator[tuple[str, str]]:
    for group in _configuration(context).groups.values():
        yield group.name, f"group of files on {group.root}"


def _volumes_and_groups(context: click.Context) -> Iterator[tuple[str, str]]:
    for volume in _configuration(context).volumes.values():
        yield volume.name, volume.path
    yield from _groups(context)


def _snapshots(_context: click.Context) -> Iterator[tuple[str, str]]:
    path = state_directory() / "catalog.sqlite"
    yield LATEST, "the newest of all"
    if path.exists():
        catalog = Catalog(path)
        try:
            yield from catalog.newest()
        finally:
            catalog.close()


def _since(context: click.Context) -> Iterator[tuple[str, str]]:
    yield NONE, "read every block in use"
    yield from _snapshots(context)


def _restores(_context: click.Context) -> Iterator[tuple[str, str]]:
    for each in attachment.load_all():
        yield each.name, f"snapshot {each.snapshot} onto {each.target}"


groups = _names(_groups)
restores = _names(_restores)
since = _names(_since)
snapshots = _names(_snapshots)
volumes_and_groups = _names(_volumes_and_groups, or_paths=True)
