"""`backup --dry-run` and `--plan`: what a backup would do, and that nothing of it was done."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import struct
import subprocess
import termios
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from changes_support import filesystem as host_filesystem
from commands_support import blockferry, command, new_depot, run
from groups_disks_support import filesystem
from sets_support import SharedVolume, common_record, make_set

FORETOLD = (
    "volume",
    "tier",
    "method",
    "tracker",
    "base",
    "part",
    "stability",
    "bytes_volume",
    "bytes_used",
    "bytes_changed",
)
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with reflinks."""
    with host_filesystem("xfs", tmp_path / "store") as place:
        yield place


@pytest.fixture
def image(store: Path, files: Path) -> Path:
    path = store / "disk.img"
    run("truncate", "-s", "64M", path)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, path)
    return path


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"BLOCKFERRY_STATE_DIR": str(tmp_path / "state")}


def in_terminal(columns: int, *arguments: object, env: dict[str, str]) -> str:
    """Run `blockferry` in a terminal of a width, and return what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    variables = os.environ | env | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    variables = {name: text for name, text in variables.items() if name not in {"COLUMNS", "NO_COLOR"}}
    process = subprocess.Popen(command(*arguments), env=variables, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # the terminal is gone with the last that had it open
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.suffix != ".lock"}


@pytest.mark.root
@pytest.mark.parametrize("tool", ["borg", pytest.param("restic", marks=pytest.mark.thorough)])
def test_a_dry_run_says_what_the_backup_then_does_and_leaves_nothing(
    tool: str, tmp_path: Path, image: Path, state: dict[str, str]
) -> None:
    depot = new_depot(tool, tmp_path / "repository")
    for changed, options in ((0, []), (3 * MIB, ["--incremental"])):
        with image.open("r+b") as file:
            file.seek(40 * MIB)
            file.write(os.urandom(changed))
        before = everything(image.parent), depot.archives()
        foretold = depot.ferry("backup", image, "--dry-run", *options, "--json", **state).json()
        assert foretold["dry_run"]
        assert (everything(image.parent), depot.archives()) == before
        done = depot.ferry("backup", image, "--sample", "0", *options, "--json", **state).json()
        not_known = {"snapshot", "archive", "bytes_compared", "bytes_stored"}
        assert foretold.keys() == done.keys() - not_known | {"dry_run", "freeze"}
        assert {name: foretold[name] for name in FORETOLD} == {name: done[name] for name in FORETOLD}
        assert (foretold["tier"], foretold["part"]) == (("changed", True) if changed else ("used", False))
        assert foretold["bytes_read"] <= done["bytes_read"] <= foretold["bytes_read"] + MIB
    checkpoints = list(Path(state["BLOCKFERRY_STATE_DIR"], "checkpoints").iterdir())
    assert len(checkpoints) == 1


@pytest.mark.root
def test_a_dry_run_is_refused_as_the_backup_would_be(
    tmp_path: Path, files: Path, mount: Callable[..., Path], attach: Callable[..., str]
) -> None:
    depot, image = new_depot("borg", tmp_path / "repository"), tmp_path / "disk.img"
    run("truncate", "-s", "64M", image)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, image)
    device = attach(image)
    place = mount(device)
    depot.ferry("backup", device, "--dry-run").refused(1, "--allow-live", str(place))
    told = depot.ferry("backup", device, "--dry-run", "--fsfreeze", "60", "--json").json()
    assert told["stability"] == "frozen"
    (place / "written-after").write_text("the filesystem was thawed")
    blockferry("backup", "--due", "--dry-run").refused(2, "--due")


@pytest.mark.root
def test_the_plan_shows_what_changed_in_a_terminal_of_any_width_and_without_one(
    tmp_path: Path, image: Path, state: dict[str, str]
) -> None:
    depot = new_depot("borg", tmp_path / "repository")
    depot.ferry("backup", image, **state)
    with image.open("r+b") as file:
        file.seek(32 * MIB)
        file.write(b"changed")
    words = ("backup", image, "--plan", "--repo", depot.reference)
    plain = blockferry(*words, env=depot.env | state).out
    picture = plain.partition("MB of 67.1 MB")[2] or plain
    assert picture.isascii()
    assert max(map(len, plain.splitlines()[-14:])) == 80
    for row in ("xX  changed: is read", "-=  in use, as before", ".   not in use"):
        assert row in plain
    shown = in_terminal(60, *words, env=depot.env | state)
    assert "\x1b[" in shown
    without_colours = "".join(piece.partition("m")[2] for piece in f"\x1b[m{shown}".split("\x1b["))
    rows = [line for line in without_colours.splitlines() if "·····" in line]
    assert rows
    assert {len(row) for row in rows} == {60}
    assert "▓" in without_colours


@pytest.mark.root
def test_the_plan_of_a_group_shows_its_files_among_all_that_is_in_use(tmp_path: Path) -> None:
    depot = new_depot("borg", tmp_path / "repository")
    with filesystem("ext4", tmp_path / "disk", 64 * MIB) as point:
        for name in ("mine", "theirs"):
            (point / name).write_bytes(os.urandom(6 * MIB))
        config = tmp_path / "config.yaml"
        config.write_text(f"groups: {{few: {{volume: {point}, paths: [{point}/mine, {point}/more]}}}}")
        env = {"BLOCKFERRY_CONFIG": str(config), "BLOCKFERRY_STATE_DIR": str(tmp_path / "state")}
        (point / "more").write_bytes(b"")
        depot.ferry("backup", "few", "--json", **env).json()
        (point / "more").write_bytes(os.urandom(2 * MIB))
        foretold = depot.ferry("backup", "few", "--plan", "--json", **env).json()
        assert (foretold["group"], foretold["tier"], foretold["bytes_read"]) == ("few", "changed", 2 * MIB)
        shown = depot.ferry("backup", "few", "--plan", **env).out
        figures = {line[4:28].strip(): line[28:] for line in shown.splitlines() if line[2:4] == "  "}
        assert "2.1 MB" in figures["of the group: is read"]
        assert "6.3 MB" in figures["of the group, as before"]
        assert len(depot.archives()) == 1


@pytest.mark.root
def test_the_plan_of_a_group_that_is_read_file_by_file_says_that_there_is_no_picture(tmp_path: Path) -> None:
    depot = new_depot("borg", tmp_path / "repository")
    with filesystem("btrfs", tmp_path / "disk", 128 * MIB) as point:
        (point / "file").write_text("content")
        config = tmp_path / "config.yaml"
        config.write_text(f"groups: {{few: {{volume: {point}}}}}")
        shown = depot.ferry("backup", "few", "--plan", BLOCKFERRY_CONFIG=str(config)).out
    assert "no picture" in shown


@pytest.mark.root
def test_the_map_of_a_snapshot_is_a_drawing_that_stands_for_itself(
    tmp_path: Path, image: Path, state: dict[str, str]
) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    depot.ferry("backup", image, "--name", "a <b> & c", **state)
    with image.open("r+b") as file:
        file.seek(32 * MIB)
        file.write(b"changed" * 100_000)
    depot.ferry("backup", image, "--name", "a <b> & c", "--incremental", **state)
    out = tmp_path / "maps" / "map.svg"
    depot.ferry("show", "latest", "--map", out, **state).refused(1, "map.svg", "no such file")
    out.parent.mkdir()
    shown = depot.ferry("show", "latest", "--map", out, "--json", **state).json()
    assert shown["map"] == str(out)
    words = "\n".join(each.text or "" for each in ET.parse(out).iter("{http://www.w3.org/2000/svg}text"))
    for said in ("a <b> & c", shown["snapshot"], shown["created"][:10], "changed blocks", "stored as this part"):
        assert said in words
    assert f"in snapshot {shown['base']}" in words
    assert [path.name for path in out.parent.iterdir()] == ["map.svg"]


def test_the_map_of_a_set_says_which_host_read_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depot, size = new_depot("borg", tmp_path / "repository"), 1 << 20
    for name, text in depot.env.items():
        monkeypatch.setenv(name, text)
    with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
        used = ExtentSet.from_pairs([(0, size // 2)])
        record = common_record(size, repository.unit(size))
        writes = {1: [(0, b"x" * 1000)]}
        made = make_set(repository, SharedVolume(os.urandom(size)), used, [used], writes, record)
    out = tmp_path / "map.svg"
    depot.ferry("show", made.snapshot.id, "--map", out)
    words = "\n".join(each.text or "" for each in ET.parse(out).iter("{http://www.w3.org/2000/svg}text"))
    assert "overwritten meanwhile: in the log: 65.5 kB" in words
    assert f"read by {socket.gethostname()}: 458.8 kB" in words
