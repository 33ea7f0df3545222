"""A volume into a repository and back, as a user does it, with both tools."""

import filecmp
import json
import os

import pytest

from commands_support import Depot, blockferry, run


def noise(path, size):
    """A file full of random bytes: what a restore leaves unwritten shows."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def same_files(image, files, tmp_path):
    """Assert that the filesystem of an image is whole and holds the files."""
    run("e2fsck", "-fn", image)
    out = tmp_path / "dumped"
    out.mkdir()
    run("debugfs", "-R", f"rdump / {out}", image)
    compared = filecmp.dircmp(files, out, ignore=["lost+found"])
    stack = [compared]
    while stack:
        each = stack.pop()
        assert not each.left_only
        assert not each.right_only
        _match, differ, errors = filecmp.cmpfiles(each.left, each.right, each.common_files, shallow=False)
        assert not differ
        assert not errors
        stack.extend(each.subdirs.values())


def test_a_volume_comes_back(depot: Depot, image, files, tmp_path):
    stored = depot.ferry("backup", image, "--json").json()
    assert stored["tier"] == "used"
    assert stored["bytes_volume"] == 256 << 20
    assert 0 < stored["bytes_used"] < 100 << 20
    assert stored["bytes_used"] <= stored["bytes_read"] < stored["bytes_used"] * 1.5 + (8 << 20)
    target = tmp_path / "target.img"
    noise(target, 256 << 20)
    depot.ferry("restore", stored["snapshot"], target).refused(1, "--force")
    restored = depot.ferry("restore", stored["snapshot"][:5], target, "--force", "--json").json()
    assert restored["bytes_volume"] == 256 << 20
    same_files(target, files, tmp_path)
    assert (
        depot.ferry("verify", "latest", "--against", target, "--json").json()["bytes_compared"] == stored["bytes_used"]
    )
    depot.check()


def test_a_new_target_file_is_sparse_and_the_right_size(depot: Depot, image, files, tmp_path):
    stored = depot.ferry("backup", image, "--json").json()
    target = tmp_path / "new.img"
    depot.ferry("restore", "latest", target, "--json").json()
    facts = target.stat()
    assert facts.st_size == 256 << 20
    assert facts.st_blocks * 512 < stored["bytes_used"] + (8 << 20)
    assert facts.st_mode & 0o077 == 0
    same_files(target, files, tmp_path)


def test_the_second_backup_of_the_same_blocks_stores_next_to_nothing(depot: Depot, image):
    first = depot.ferry("backup", image, "--json").json()
    second = depot.ferry("backup", image, "--json").json()
    assert first["snapshot"] != second["snapshot"]
    assert second["bytes_stored"] < first["bytes_stored"] / 20
    listed = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert [each["id"] for each in listed] == [first["snapshot"], second["snapshot"]]
    assert [each["run"]["bytes_stored"] for each in listed] == [first["bytes_stored"], second["bytes_stored"]]
    assert listed[0]["archive"] == first["archive"]
    assert set(depot.archives()) == {first["archive"], second["archive"]}


def test_delta_writes_only_what_differs(depot: Depot, image, tmp_path):
    stored = depot.ferry("backup", image, "--json").json()
    with image.open("r+b") as file:
        file.seek(stored["bytes_used"] and 1024)
        superblock = file.read(1024)
        file.seek(1024)
        file.write(b"\0" * 1024)
    done = depot.ferry("restore", "latest", image, "--delta", "--force", "--json").json()
    assert 0 < done["bytes_written"] <= 4 << 20
    with image.open("rb") as file:
        file.seek(1024)
        assert file.read(1024) == superblock
    assert depot.ferry("verify", "latest", "--against", image).code == 0


def test_show_says_what_the_record_says(depot: Depot, image):
    stored = depot.ferry("backup", image, "--name", "vm", "--json").json()
    shown = depot.ferry("show", stored["snapshot"], "--json").json()
    assert (shown["snapshot"], shown["volume"], shown["tier"]) == (stored["snapshot"], "vm", "used")
    assert shown["bytes"]["data"] == stored["bytes_used"]
    assert shown["bytes"]["data"] + shown["bytes"]["zero"] == 256 << 20
    words = depot.ferry("show", "latest").out
    assert stored["archive"] in words
    assert "offline" in words


def test_an_odd_size_and_no_filesystem_come_back_byte_for_byte(depot: Depot, tmp_path):
    image = tmp_path / "odd.bin"
    with image.open("wb") as file:
        file.write(os.urandom(3_333_333))
        file.seek(40 << 20)
        file.write(os.urandom(1_234_567))
        file.truncate((50 << 20) + 777)
    stored = depot.ferry("backup", image, "--json").json()
    assert stored["tier"] == "whole"
    assert stored["tier_reason"]
    target = tmp_path / "back.bin"
    depot.ferry("restore", "latest", target, "--json").json()
    assert filecmp.cmp(image, target, shallow=False)
    again = tmp_path / "again.bin"
    noise(again, 64 << 20)
    depot.ferry("restore", "latest", again, "--force", "--json").json()
    with again.open("rb") as found, image.open("rb") as wanted:
        assert found.read((50 << 20) + 777) == wanted.read()


def test_the_catalog_is_made_again_from_the_repository(depot: Depot, image, tmp_path):
    stored = depot.ferry("backup", image, "--json").json()
    state = str(tmp_path / "another-state")
    assert depot.ferry("snapshots", "--json", BLOCKFERRY_STATE_DIR=state).json()["snapshots"][0]["run"] is None
    assert depot.ferry("catalog", "rebuild", "--json", BLOCKFERRY_STATE_DIR=state).json()["snapshots"] == 1
    assert depot.ferry("restore", stored["snapshot"], tmp_path / "x.img", BLOCKFERRY_STATE_DIR=state).code == 0


def test_the_environment_names_the_repository(depot: Depot, image):
    variable = {"borg": "BORG_REPO", "restic": "RESTIC_REPOSITORY"}[depot.tool]
    env = depot.env | {variable: str(depot.path)}
    assert blockferry("backup", image, "--json", env=env).json()["snapshot"]
    assert len(blockferry("snapshots", "--json", env=env).json()["snapshots"]) == 1


def test_used_lists_extents(image):
    found = blockferry("used", image, "--json").json()
    assert (found["size"], found["filesystem"], found["tier"]) == (256 << 20, "ext4", "used")
    assert sum(length for _start, length in found["extents"]) == found["used_bytes"]
    assert found["extents"] == sorted(found["extents"])


def test_progress_has_a_total_and_a_rate(depot: Depot, image):
    done = depot.ferry("--log-json", "backup", image)
    lines = [json.loads(line) for line in done.err.splitlines()]
    progress = [line for line in lines if line["type"] == "progress"]
    assert progress
    assert progress[-1]["done"] == progress[-1]["total"] > 0
    assert progress[-1]["rate"] > 0


@pytest.mark.root
def test_a_loop_device_is_backed_up_and_restored_to_another(depot: Depot, image, files, attach, tmp_path):
    source = attach(image)
    assert depot.ferry("backup", source, "--json").json()["tier"] == "used"
    blank = tmp_path / "blank.img"
    noise(blank, 256 << 20)
    target = attach(blank)
    depot.ferry("restore", "latest", target, "--json").json()
    same_files(target, files, tmp_path)


@pytest.mark.root
def test_a_mounted_volume_is_refused_and_then_allowed(depot: Depot, image, mount, attach):
    place = mount(attach(image))
    depot.ferry("backup", image).refused(1, "--allow-live", str(place))
    assert depot.archives() == []
    stored = depot.ferry("backup", image, "--allow-live", "--json").json()
    assert (stored["stability"], stored["method"]) == ("live", "getfsmap")


@pytest.mark.root
def test_a_frozen_filesystem_is_clean_after_a_restore(depot: Depot, image, files, mount, attach, tmp_path):
    place = mount(attach(image))
    (place / "fresh").write_bytes(os.urandom(100_000))
    stored = depot.ferry("backup", image, "--fsfreeze", "120", "--json").json()
    assert (stored["stability"], stored["method"]) == ("frozen", "getfsmap")
    (place / "written-after").write_text("the filesystem was thawed")
    target = tmp_path / "target.img"
    depot.ferry("restore", "latest", target, "--json").json()
    run("e2fsck", "-fn", target)
    assert run("debugfs", "-R", "ls -p /", target).count("/fresh/") == 1


def test_a_repository_and_a_volume_may_be_named_from_where_one_is(depot: Depot, image, monkeypatch):
    monkeypatch.chdir(image.parent)
    where = f"{depot.tool}:{depot.path.relative_to(image.parent)}"
    done = blockferry("backup", image.name, "--repo", where, env=depot.env)
    assert done.code == 0, done.err
    assert blockferry("restore", "latest", "back.img", "--repo", where, env=depot.env).code == 0
    assert (image.parent / "back.img").stat().st_size == image.stat().st_size
