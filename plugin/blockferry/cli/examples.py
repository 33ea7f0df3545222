"""Help that ends with an example: what a command's docstring says last is shown below its options."""

from __future__ import annotations

import inspect
import re

import click

_EXAMPLES = re.compile(r"\n*\x08\nExamples?:\n.*\Z", re.DOTALL)


def examples_last(command: click.Command) -> click.Command:
    """Return the command, and with it those below it, with its examples as its last words.

    A group of commands that has none shows those of its first command.
    """
    words = inspect.cleandoc(command.help or "")
    found = _EXAMPLES.search(words)
    if found:
        command.help, command.epilog = words[: found.start()], found[0].lstrip("\n")
    if isinstance(command, click.Group):
        below = [examples_last(each) for each in command.commands.values()]
        command.epilog = command.epilog or (below[0].epilog if below else None)
    return command
