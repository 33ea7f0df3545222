"""What is made of the commands' own words: manual pages, completions, and the example at the end of every help."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from blockferry.cli.main import COMMANDS, cli
from pages_support import Block, accept

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manual", ROOT / "scripts" / "manual.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_below_packaging_are_those_that_the_script_writes(manual: ModuleType) -> None:
    made = manual.files()
    there = {
        str(path.relative_to(PACKAGING)): path.read_text()
        for folder in ("man", "completion")
        for path in (PACKAGING / folder).iterdir()
    }
    assert there.keys() == made.keys(), "run: scripts/generate"
    assert [name for name in made if there[name] != made[name]] == [], "run: scripts/generate"


def test_every_command_has_a_page_that_names_its_options(manual: ModuleType) -> None:
    pages = manual.files()
    assert {f"man/blockferry-{name}.1" for name in COMMANDS} < pages.keys()
    for path in commands(cli):
        command = resolve(path)
        page = pages["man/" + "-".join(("blockferry", *path[:1])) + ".1"]
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else []:
                assert option.replace("-", "\\-") in page, (path, option)


def test_the_pages_render_without_warnings() -> None:
    if not shutil.which("man") or not shutil.which("groff"):
        pytest.skip("needs man-db and groff: apt install man-db groff-base")
    for page in sorted((PACKAGING / "man").iterdir()):
        done = subprocess.run(["man", "--warnings", "-l", str(page)], capture_output=True, text=True, check=True)
        assert done.stderr == "", page.name
        assert "SYNOPSIS" in done.stdout


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            assert below is not None
            yield from commands(below, (*path, name))


def resolve(path: tuple[str, ...]) -> click.Command:
    command: click.Command | None = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name)
    assert command
    return command


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_the_help_ends_with_examples_that_are_accepted(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], terminal_width=200).output
    _help, title, examples = re.split(r"^  (Examples?:)$", shown, flags=re.MULTILINE)
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert title == ("Example:" if len(lines) == 1 else "Examples:")
    for line in lines:
        first, *_others = [accept(words) for words in Block("help", 1, "", line).command_lines()]
        assert first[: len(path)] == path
