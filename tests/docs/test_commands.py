"""docs/commands.md shows what the commands say of themselves; UPDATE_DOCS=1 writes it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from blockferry.cli.main import cli

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
MARK = "<!-- help: written by UPDATE_DOCS=1 pytest tests/docs/test_commands.py -->\n"


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words that name a command, and each below it."""
    yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


def documented() -> str:
    """Return the part of the page that is made of the commands' own words."""
    sections = []
    for path in commands(cli):
        shown = CliRunner().invoke(cli, [*path, "--help"], prog_name="blockferry", terminal_width=100)
        assert shown.exit_code == 0
        title = " ".join(("blockferry", *path))
        lines = "\n".join(line.rstrip() for line in shown.output.rstrip().splitlines())
        sections.append(f"\n## {title}\n\n```text\n{lines}\n```\n")
    return "".join(sections)


def test_the_page_shows_the_help_of_every_command() -> None:
    before, mark, shown = PAGE.read_text().partition(MARK)
    assert mark
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(before + mark + documented())
    else:
        assert shown == documented(), "run: UPDATE_DOCS=1 pytest tests/docs/test_commands.py"
