"""docs/commands.md shows what the commands say of themselves (UPDATE_DOCS=1 writes that anew), and what they print."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from blockferry.cli.main import cli
from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from blockferry.snapshot import Record
from changed_support import why_no_bpftrace
from groups_support import store_group
from sets_support import SharedVolume, common_record, make_set

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
BLOCKFERRY = str(Path(sys.executable).with_name("blockferry"))
GROUPS = {"catalog", "cluster", "config", "guard", "schedule", "systemd", "track", "udev"}
"""Commands that have commands below them."""
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
def attach(place: Path) -> Iterator[Callable[[Path], str]]:
    """Return a function that shows an image as a loop device."""
    del place  # which is unmounted after that
    with contextlib.ExitStack() as attached:

        def attach_image(image: Path) -> str:
            command = ["losetup", "--find", "--show", str(image)]
            device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            attached.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield attach_image


@pytest.fixture(scope="module")
def printed(place: Path, attach: Callable[[Path], str]) -> dict[str, dict[str, object]]:
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
        patch.setenv("BLOCKFERRY_RUNTIME_DIR", str(place / "run"))
        patch.setenv("BLOCKFERRY_INDEX", f"sqlite://{place}/index.sqlite")
        with (place / "shared.img").open("wb") as file:
            file.truncate(4 << 20)
        device = attach(place / "shared.img")
        return {
            " ".join(words[: 2 if words[0] in GROUPS else 1]): blockferry(*words)
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
                ("systemd", "install", "--root", place / "root"),
                ("systemd", "remove", "--root", place / "root"),
                ("guard", "start", device, "--name", "lun0"),
                ("guard", "status"),
                ("cluster", "hosts", "lun0"),
                ("cluster", "backup", device, "--name", "lun0", "--repo", repository),
                ("cluster", "status", "lun0"),
                ("guard", "stop", "lun0"),
                ("schedule", "install", "--directory", place / "units"),
                ("schedule", "show", "--directory", place / "units"),
                ("schedule", "remove", "--directory", place / "units"),
                ("apply-log", stored_set(repository), "--repo", repository),
                ("delete", "latest", "--repo", repository),
                ("prune", "volume.img", "--keep-last", "9", "--repo", repository),
                ("completion", "bash"),
                ("export", image),
                ("release", "--force"),
                ("config", "show"),
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
    command = [BLOCKFERRY, *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


NOT_RUN_HERE = {
    *("watch", "udev restore", "cluster worker", "mount", "track start", "track stop", "track status"),
    *("cluster forget", "config check", "config schema"),
}
"""What waits for something to happen, takes a kernel of its own, finds nothing, or has a result of another form."""


def rows() -> dict[str, str]:
    """Return what the page says of each JSON result, by command."""
    return dict(re.findall(r"^\| `([a-z -]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))


def fields_of(command: str) -> set[str]:
    """Return the fields that the page names for a command's JSON result."""
    text = rows()[command].partition("a list of objects with")[0]
    named = set(re.findall(r"`(\w+)`", text)) - {"start", "length", "attach", "merge"}
    if "the fields of [the record]" in text:
        named |= {field.name for field in dataclasses.fields(Record)}
    others = re.findall("the fields of `([a-z ]+)`", text)
    return named.union({"version"}, *map(fields_of, others))


def assert_as_the_page_says(command: str, result: dict[str, object]) -> None:
    assert fields_of(command) == set(result), command
    of_entries = rows()[command].partition("a list of objects with")[2]
    if of_entries:
        (entries,) = (value for value in result.values() if isinstance(value, list) and dict in map(type, value))
        assert set(re.findall(r"`(\w+)`", of_entries)) == set(entries[0]), command


@pytest.mark.root
def test_the_page_names_the_fields_of_every_json_result(printed: dict[str, dict[str, object]]) -> None:
    assert rows().keys() - NOT_RUN_HERE == printed.keys()
    for command, result in printed.items():
        assert_as_the_page_says(command, result)


def test_every_command_has_a_json_result_and_the_page_has_its_fields() -> None:
    found = {path: command_named(path) for path in commands(cli)}
    ends = {path: each for path, each in found.items() if not isinstance(each, click.Group)}
    silent = [path for path, each in ends.items() if not any("--json" in option.opts for option in each.params)]
    assert silent == []
    assert {" ".join(path) for path in ends} == rows().keys()
    assert {path[0] for path in ends if len(path) > 1} == GROUPS


def command_named(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        below = command.get_command(click.Context(command), name)
        assert below is not None
        command = below
    return command


@pytest.mark.root
def test_mount_says_where_the_files_are(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    subprocess.run(["restic", "init", "--quiet", "--repo", str(tmp_path / "restic")], check=True)
    group = stored_group(place / "mounted", f"restic:{tmp_path}/restic")
    (tmp_path / "at").mkdir()
    words = ["mount", group, tmp_path / "at", "--repo", f"restic:{tmp_path}/restic", "--json"]
    with subprocess.Popen([BLOCKFERRY, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
        try:
            assert (tmp_path / "at" / "file").read_text() == "content"
        finally:
            process.send_signal(signal.SIGINT)
    assert said["path"] == str(tmp_path / "at")
    assert_as_the_page_says("mount", said)


@pytest.mark.root
def test_track_says_what_is_tracked(attach: Callable[[Path], str], place: Path) -> None:
    reason = why_no_bpftrace()
    if reason:
        pytest.skip(reason)
    (place / "tracked.img").write_bytes(bytes(1 << 20))
    device = attach(place / "tracked.img")
    try:
        for words in (("track", "start", device), ("track", "status"), ("track", "stop", device)):
            assert_as_the_page_says(" ".join(words[:2]), blockferry(*words))
    finally:
        subprocess.run([BLOCKFERRY, "track", "stop", device], check=False, capture_output=True)
