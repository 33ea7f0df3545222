"""`blockferry files` on real borg and restic repositories."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from blockferry.groups.table import CHANGED
from commands_support import Depot, new_depot
from groups_support import make_tree, state_of, store_in

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "top")


@pytest.fixture(scope="module", params=["borg", "restic"])
def filled(request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Depot:
    depot = new_depot(request.param, tmp_path_factory.mktemp("depot") / "repository")
    store_in(depot, tree)
    return depot


def test_files_come_back_from_a_real_repository(filled: Depot, tree: Path, tmp_path: Path) -> None:
    done = filled.ferry("files", "latest", "--to", tmp_path / "to", "--json").json()
    assert done["problems"] == []
    assert done["bytes_written"] > 20 << 20
    assert state_of(tmp_path / "to") == state_of(tree)


def test_a_pattern_selects_what_comes_back(filled: Depot, tree: Path, tmp_path: Path) -> None:
    done = filled.ferry("files", "latest", "private", "sh:**/hard*", "--to", tmp_path / "to")
    assert done.code == 0, done.err
    before = state_of(tree)
    there = state_of(tmp_path / "to")
    assert there.keys() == {path for path in before if path.startswith(b"private") or b"hard" in path} | {
        b"",
        b"caf\xe9 \xff",
    }


def test_a_pattern_that_matches_nothing_is_refused_and_nothing_is_made(filled: Depot, tmp_path: Path) -> None:
    filled.ferry("files", "latest", "privat", "--to", tmp_path / "to").refused(2, "privat", "--list")
    assert not (tmp_path / "to").exists()


def test_the_list_has_a_line_for_every_entry_whatever_its_name(filled: Depot, tree: Path) -> None:
    lines = filled.ferry("files", "latest", "--list").out.splitlines()
    assert len(lines) == len(state_of(tree))
    assert all(line.isprintable() for line in lines)
    (plain,) = (line for line in lines if line.endswith("caf\\xe9 \\xff/new\\nline/\\x1b[2J"))
    assert plain.split()[:4] == ["-rwx--s--x", "3", "1003", "70000"]
    assert any(line.startswith("lrwxrwxrwx") and line.endswith("to nothing -> /nowhere/at all") for line in lines)
    assert sum(" link to " in line for line in lines) == 4
    assert any(line.startswith("drwxrwx--T") and line.endswith(" private") for line in lines)


def test_the_list_as_json_names_every_path(filled: Depot, tree: Path) -> None:
    listed = filled.ferry("files", "latest", "--list", "--json").json()
    paths = {
        base64.b64decode(entry["path_b64"]) if "path_b64" in entry else entry["path"].encode()
        for entry in listed["entries"]
    }
    assert paths == {path or b"." for path in state_of(tree)}
    (big,) = (entry for entry in listed["entries"] if entry["path"] == "big")
    facts = (tree / "big").stat()
    assert (big["size"], big["mtime_ns"], big["uid"]) == (facts.st_size, facts.st_mtime_ns, facts.st_uid)


def test_a_file_that_is_there_needs_force(filled: Depot, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "empty").write_text("mine")
    filled.ferry("files", "latest", "empty", "--to", tmp_path / "to").refused(1, "there already: empty", "--force")
    assert (tmp_path / "to" / "empty").read_text() == "mine"
    assert filled.ferry("files", "latest", "empty", "--to", tmp_path / "to", "--force").code == 0
    assert (tmp_path / "to" / "empty").read_text() == ""


@pytest.mark.parametrize("words", [(), ("--list", "--to", "/nowhere")])
def test_what_to_do_has_to_be_said(words: tuple[str, ...], filled: Depot) -> None:
    filled.ferry("files", "latest", *words).refused(2, "--list", "--to")


def test_commands_for_volumes_refuse_a_group_and_name_the_one_for_files(filled: Depot, tmp_path: Path) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(4096))
    filled.ferry("restore", "latest", tmp_path / "new.img").refused(2, "blockferry files")
    filled.ferry("verify", "latest", "--against", target).refused(2, "blockferry files")
    filled.ferry("attach", "latest", tmp_path / "hot.img").refused(2, "blockferry files")
    filled.ferry("arm", "latest", "serial:NOWHERE").refused(2, "blockferry files")
    assert not (tmp_path / "new.img").exists()
    assert not (tmp_path / "hot.img").exists()
    assert filled.ferry("verify", "latest").code == 0


def test_a_volume_s_snapshot_has_no_files(filled: Depot, tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(1 << 20))
    made = filled.ferry("backup", image, "--json").json()
    filled.ferry("files", made["snapshot"], "--list").refused(2, "not of a group", "blockferry restore")
    filled.ferry("delete", made["snapshot"])


def test_what_is_not_as_it_was_exits_with_3_and_is_named(tmp_path: Path) -> None:
    depot = new_depot("borg", tmp_path / "repository")
    top = tmp_path / "top"
    top.mkdir()
    (top / "busy").write_text("content")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groups_support.FLAGS", {b"busy": CHANGED})
        store_in(depot, top)
    done = depot.ferry("files", "latest", "--to", tmp_path / "to", "--json").refused(3, "busy", "changed")
    assert [problem["path"] for problem in json.loads(done.out)["problems"]] == ["busy"]
    assert (tmp_path / "to" / "busy").read_text() == "content"
    assert "(changed)" in depot.ferry("files", "latest", "--list").out
