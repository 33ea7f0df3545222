"""Write the manual pages and the completions for shells below packaging/, from what the commands say of themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from blockferry.cli.completion import script
from blockferry.cli.main import cli

PACKAGING = Path(__file__).parents[1] / "packaging"
COMPLETIONS = {"bash": "blockferry", "zsh": "_blockferry", "fish": "blockferry.fish"}
"""By shell: what the file has to be called to be found."""

_END = r"""
.SH EXIT STATUS
.TP
.B 0
done
.TP
.B 1
failed; nothing that looks complete was left behind
.TP
.B 2
the command, or the configuration, is off
.TP
.B 3
done except for parts that the message names
.TP
.B 75
not now: somebody holds a lock; the same command may succeed later
"""
_OVERVIEW_END = rf"""{_END}.SH ENVIRONMENT
.TP
.B BLOCKFERRY_CONFIG
the configuration file
.TP
.B BLOCKFERRY_STATE_DIR
where locks, checkpoints and the catalog are
.TP
.BR BORG_REPO ", " RESTIC_REPOSITORY
the repository where none is named
.TP
.BR BLOCKFERRY_BORG ", " BLOCKFERRY_RESTIC
which borg and which restic to call
.PP
borg and restic take passphrases and keys from the variables that they take them from anyway.
.SH FILES
.TP
.I /etc/blockferry/config.yaml
the configuration
.TP
.I /var/lib/blockferry
the state of root's; else below
.I $XDG_STATE_HOME
"""


def main() -> None:
    """Write every file, and remove those of commands that are gone."""
    for name, text in files().items():
        path = PACKAGING / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for folder in ("man", "completion"):
        for path in (PACKAGING / folder).iterdir():
            if str(path.relative_to(PACKAGING)) not in files():
                path.unlink()


def files() -> dict[str, str]:
    """Return, by its place below packaging/, what is in each file."""
    context = click.Context(cli, info_name="blockferry", **cli.context_settings)
    below = [click.Context(command, info_name=name, parent=context) for name, command in _commands(context)]
    pages = {f"man/blockferry-{each.info_name}.1": page(each) for each in below}
    pages["man/blockferry.1"] = overview(context, below)
    return pages | {f"completion/{name}": script(shell) for shell, name in COMPLETIONS.items()}


def overview(context: click.Context, below: list[click.Context]) -> str:
    """Return the page that names all commands."""
    listed = "".join(f".TP\n.BR {_page_name(each)} (1)\n{_words(_short(each))}\n" for each in below)
    return f"{_head(context)}{_body(context)}.SH COMMANDS\n{listed}{_examples(context)}{_OVERVIEW_END[1:]}"


def page(context: click.Context) -> str:
    """Return the page of a command, and of those below it."""
    text = f"{_head(context)}{_body(context)}"
    below = [click.Context(command, info_name=name, parent=context) for name, command in _commands(context)]
    for each in below:
        title = _plain(str(each.info_name).upper())
        text += f".SH {title}\n{_synopsis(each)}{_body(each, heading='.PP')}{_examples(each, heading='.PP')}"
    text += _examples(context) if not below else ""
    return f"{text}{_END[1:]}.SH SEE ALSO\n.BR blockferry (1)\n"


def _commands(context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a group, by name."""
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield name, command


def _page_name(context: click.Context) -> str:
    return _plain(context.command_path.replace(" ", "-"))


def _short(context: click.Context) -> str:
    return context.command.get_short_help_str(limit=200)


def _head(context: click.Context) -> str:
    name = _page_name(context)
    title = f'.TH {name.upper()} 1 "" blockferry "Manual of blockferry"'
    return f"{title}\n.SH NAME\n{name} \\- {_words(_short(context).rstrip('.'))}\n.SH SYNOPSIS\n{_synopsis(context)}"


def _synopsis(context: click.Context) -> str:
    usage = " ".join(context.command.collect_usage_pieces(context))
    return f".B {_plain(context.command_path)}\n{_plain(usage)}\n"


def _body(context: click.Context, heading: str = ".SH DESCRIPTION") -> str:
    """Return a command's description and options."""
    paragraphs = "\n.PP\n".join(_paragraphs(context.command.help or ""))
    named = [each for each in context.command.get_params(context) if isinstance(each, click.Option)]
    records = [each.get_help_record(context) for each in named]
    options = "".join(f".TP\n.B {_plain(name)}\n{_words(what)}\n" for name, what in filter(None, records))
    between = ".SH OPTIONS\n" if heading.startswith(".SH") else ".PP\nOptions:\n"
    return f"{heading}\n{paragraphs}\n{between}{options}"


def _examples(context: click.Context, heading: str = "") -> str:
    _title, _newline, lines = inspect.cleandoc(context.command.epilog or "").removeprefix("\b\n").partition("\n")
    if not lines:
        return ""
    shown = "\n".join(_line(_plain(line.strip())) for line in lines.splitlines())
    many = "EXAMPLES" if "\n" in lines else "EXAMPLE"
    above = ".PP\nFor example:\n.PP\n" if heading else f".SH {many}\n"
    return f"{above}.nf\n.RS 4\n{shown}\n.RE\n.fi\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        yield _words(paragraph)


def _words(text: str) -> str:
    """Return running words: what is between backquotes is bold."""
    bold = re.sub(r"`([^`]*)`", r"\\fB\1\\fP", _plain(" ".join(text.split())))
    return _line(bold)


def _plain(text: str) -> str:
    """Return text of which nothing means anything to roff."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def _line(text: str) -> str:
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
