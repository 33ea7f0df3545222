"""The commands and the script of docs/groups-restore.md bring a group's files back without blockferry."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from commands_support import Depot
from groups_support import back_up, make_tree, state_of
from pages_support import Page, run_shell

PAGE = Page("groups-restore.md")
WITHOUT = "Without blockferry"

pytestmark = pytest.mark.root


def test_the_script_brings_back_what_the_stock_tool_extracts(
    depot: Depot, mount: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "volume.img"
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    place = mount(image, "loop")
    top = make_tree(place / "top")
    archive = back_up(depot, top).archive
    for name, text in depot.env.items():
        monkeypatch.setenv(name, text)
    borg, restic = PAGE.blocks(below=WITHOUT)
    extract = {"borg": borg, "restic": restic}[depot.tool]
    places = {
        f"/srv/backup/{depot.tool}": depot.path,
        "/var/tmp/group": tmp_path / "group",
    } | ({"the-name-of-the-archive": archive} if depot.tool == "borg" else {})
    run_shell(extract, places)
    script = PAGE.block("python")
    (tmp_path / "files.py").write_text(script)
    command = ["python3", "-I", tmp_path / "files.py", tmp_path / "group", place / "back"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert state_of(place / "back") == state_of(top)


def test_the_script_is_short() -> None:
    script = PAGE.block("python")
    assert len(script.splitlines()) <= 70
