"""The blocks of README.md and docs/*.md, for the tests that hold them true.

What a block is, its language says: `sh` and `python` are run by a test, `console` is a session that one repeats, `yaml`
and the like are read by who reads such files; `text`, and what is only indented, is shown. docs/test_every_block.py
sees to that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

from blockferry.cli.context import Context
from blockferry.cli.main import cli
from blockferry.cli.output import Output

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RUN = ("sh", "python", "console")
"""The languages of blocks that a test has to run."""
SHOWN = ("text", "")
BEFORE = r"""^|[;|&(!]|\bif |\bdo |\w=\S+ |=["'].*["'] |# |root |- """
"""What a command may follow in a shell; and a prompt, the user in a crontab, the dash of a list in YAML."""
PROGRAM = re.compile(rf"(?:{BEFORE})\s*(?:/usr/bin/)?blockferry (?=(\S.*))")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language, "" if it is indented, and where it begins."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def lines(self) -> Iterator[str]:
        """Yield the lines, those that go on in the next joined; of two hosts' side by side one after the other."""
        for side in _sides(self.text.splitlines()):
            yield from re.sub(r"\\\n\s*", "", "\n".join(side)).splitlines()

    def command_lines(self) -> Iterator[list[str]]:
        """Yield the words of each command line, behind `blockferry`."""
        for line in self.lines():
            yield from map(words_of, PROGRAM.findall(re.split(r" {3,}", line.strip())[0]))


class Page:
    """A page whose blocks a test takes, so that the page cannot say anything else than what is tested."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = PAGES[name].read_text()

    def blocks(self, language: str = "sh", below: str = "") -> list[str]:
        """Return all blocks of a language, or those below a heading: to be unpacked, so that a new one is noticed."""
        first, end = self._section(below)
        found = [each for each in blocks_of(self.name) if each.language == language and first <= each.line <= end]
        assert found, f"{self.name} has no block in {language} {below and f'below {below!r}'}"
        return [each.text for each in found]

    def block(self, language: str = "sh", below: str = "") -> str:
        """Return the only one."""
        (found,) = self.blocks(language, below)
        return found

    def _section(self, heading: str) -> tuple[int, int]:
        if not heading:
            return 0, sys.maxsize
        lines = self.text.splitlines()
        (start,) = [number for number, line in enumerate(lines, 1) if re.fullmatch(rf"#+ {re.escape(heading)}", line)]
        level = lines[start - 1].count("#", 0, lines[start - 1].index(" "))
        ends = [n for n, line in enumerate(lines, 1) if n > start and re.match(rf"#{{1,{level}}} ", line)]
        return start, min(ends, default=sys.maxsize)


def with_places(text: str, places: Mapping[str, object]) -> str:
    """Return a text of a page with its example places replaced by real ones, each of which it has to have."""
    for example in places:
        assert example in text, f"the page no longer says {example}"
    examples = "|".join(re.escape(example) for example in sorted(places, key=len, reverse=True))
    return re.sub(examples, lambda found: str(places[found[0]]), text) if places else text


def run_shell(
    script: str, places: Mapping[str, object], *, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> str:
    """Run a script of a page with real places, and our `blockferry` first in its path; return what it printed."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | (env or {})
    words = [*prefix, "sh", "-euxc", with_places(script, places)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _tokens(name: str) -> list[Token]:
    return MarkdownIt().enable("table").parse(PAGES[name].read_text())


def blocks_of(name: str) -> list[Block]:
    """Return the blocks of a page; Sphinx's own (`{toctree}`) are none."""
    found = []
    for token in _tokens(name):
        if token.type in {"fence", "code_block"} and not token.info.startswith("{"):
            assert token.map
            found.append(Block(name, token.map[0] + 1, token.info, token.content))
    return found


def said_in_passing(name: str) -> list[str]:
    """Return what stands behind `blockferry` in each command that the text of a page names."""
    spans = [child.content for token in _tokens(name) for child in token.children or [] if child.type == "code_inline"]
    return [each.removeprefix("blockferry ") for each in spans if each.startswith("blockferry ")]


def _sides(lines: list[str]) -> list[list[str]]:
    """Return columns of lines: two if the first line names two hosts."""
    named = re.match(r"[a-z]+ [a-z]+ {3,}(?=[a-z]+ [a-z]+$)", lines[0])
    if not named:
        return [lines]
    middle = named.end()
    apart = [line for line in lines[1:] if not line[:middle].strip() or line[middle - 3 : middle].isspace()]
    left = [line[:middle].rstrip() if line in apart else line for line in lines[1:]]
    return [left, [line[middle:] for line in apart]]


def words_of(line: str) -> list[str]:
    """Return the words of a shell's command, up to a comment, a redirection or what else ends it."""
    lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""  # an anchor of a reference is no comment
    return list(itertools.takewhile(lambda word: not re.match(r"[();|&<>]", word), lexer))


def accept(words: Sequence[str]) -> tuple[str, ...]:
    """Have click parse a command line; return the names of the commands. UsageError if it does not accept it."""
    names: tuple[str, ...] = ()
    obj = Context(Output(as_json=False, log_json=False, verbosity=0))
    context = cli.make_context("blockferry", list(words), obj=obj)
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert name
        assert command
        names = (*names, name)
        context = command.make_context(name, rest, parent=context)
    return names
