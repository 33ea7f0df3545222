"""docs/commands.md shows what the commands say of themselves (UPDATE_DOCS=1 writes that anew), and what they print."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from blockferry.cli.main import cli
from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from blockferry.snapshot import Record
from groups_support import store_group
from sets_support import SharedVolume, common_record, make_set

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
MARK = "<!-- help: written by UPDATE_DOCS=1 pytest tests/docs/test_commands.py -->\n"


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words that name a command, and each below it."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory on a filesystem that shares blocks between files."""
    place = tmp_path_factory.mktemp("commands")
    host, point = place / "host.img", place / "host"
    with host.open("wb") as file:
        file.truncate(2 << 30)
    point.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(host)], check=True)
    subprocess.run(["mount", "-o", "loop", str(host), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture(scope="module")
def printed(place: Path) -> dict[str, dict[str, object]]:
    """What the commands print as JSON, by command, for two backups of a small volume and its restore."""
    image, repository, copy = place / "volume.img", f"borg:{place}/repository", place / "restored.img"
    hot = place / "hot.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BORG_PASSPHRASE", "secret")
        (place / "config.yaml").write_text(f"groups: {{small: {{volume: {place}, schedule: hourly}}}}")
        patch.setenv("BLOCKFERRY_CONFIG", str(place / "config.yaml"))
        subprocess.run(["borg", "init", "--encryption=repokey-blake2", repository.removeprefix("borg:")], check=True)
        group = stored_group(place / "files", repository)
        return {
            " ".join(words[: 2 if words[0] in {"catalog", "config", "schedule", "udev"} else 1]): blockferry(*words)
            for words in (
                ("files", group, "--to", place / "back", "--repo", repository),
                ("used", image),
                ("group", "small"),
                ("backup", image, "--repo", repository),
                ("changed", image, "--repo", repository),
                ("backup", image, "--repo", repository, "--incremental"),
                ("merge", "latest", "--repo", repository),
                ("snapshots", "--repo", repository),
                ("show", "latest", "--repo", repository),
                ("restore", "latest", copy, "--repo", repository),
                ("attach", "latest", hot, "--repo", repository),
                ("status", "hot.img"),
                ("serve", "hot.img"),
                ("detach", "hot.img"),
                ("verify", "latest", "--repo", repository, "--against", copy),
                ("arm", "latest", "serial:NOWHERE", "--repo", repository),
                ("armed",),
                ("disarm", "serial:NOWHERE"),
                ("udev", "install", "--root", place / "root"),
                ("schedule", "install", "--directory", place / "units"),
                ("schedule", "show", "--directory", place / "units"),
                ("schedule", "remove", "--directory", place / "units"),
                ("apply-log", stored_set(repository), "--repo", repository),
                ("delete", "latest", "--repo", repository),
                ("export", image),
                ("release", "--force"),
                ("config", "generate", "borgmatic", "small"),
                ("doctor",),
                ("catalog", "rebuild", "--repo", repository),
            )
        }


def stored_group(top: Path, reference: str) -> str:
    top.mkdir()
    (top / "file").write_text("content")
    with contextlib.closing(repository_named(plugin_manager(), reference)) as repository:
        return store_group(top, repository).id


def stored_set(reference: str) -> str:
    with contextlib.closing(repository_named(plugin_manager(), reference)) as repository:
        used, volume = ExtentSet.whole(1 << 20), SharedVolume(bytes(1 << 20))
        record = common_record(1 << 20, repository.unit(1 << 20))
        return make_set(repository, volume, used, [used], {}, record).snapshot.id


def blockferry(*words: str | Path) -> dict[str, object]:
    command = [str(Path(sys.executable).with_name("blockferry")), *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.root
def test_the_page_names_the_fields_of_every_json_result(printed: dict[str, dict[str, object]]) -> None:
    rows = dict(re.findall(r"^\| `([a-z -]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() == printed.keys()
    for command, result in printed.items():
        text, _, of_entries = rows[command].partition("a list of objects with")
        named = set(re.findall(r"`(\w+)`", text)) - {"start", "length"}
        if "the fields of [the record]" in text:
            named |= {field.name for field in dataclasses.fields(Record)}
        for other in ("attach", "merge"):
            if f"the fields of `{other}`" in text:
                named |= set(printed[other])
        assert named - {"attach", "merge"} | {"version"} == set(result), command
        if of_entries:
            (entries,) = (value for value in result.values() if isinstance(value, list))
            assert set(re.findall(r"`(\w+)`", of_entries)) == set(entries[0]), command
