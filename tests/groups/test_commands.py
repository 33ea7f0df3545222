"""Groups as a user has them backed up: by name, by schedule, several at once, with a tracker, under rules to keep."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from changed_support import why_no_bpftrace
from commands_support import Depot, blockferry, borg_first, new_depot, restic_first, run
from groups_disks_support import filesystem

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 with some files in three directories."""
    with filesystem("ext4", tmp_path / "disk", 64 * MIB) as point:
        chance = random.Random(3)
        for name in ("mail", "www", "both"):
            (point / name).mkdir()
            for number in range(30):
                (point / name / f"file-{number}").write_bytes(chance.randbytes(chance.randrange(60_000)))
        yield point


@pytest.fixture(params=["borg", "restic"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Depot:
    return new_depot(request.param, tmp_path / "repository")


def configured(disk: Path, depot: Depot, **groups: str) -> dict[str, str]:
    """Write a configuration with these groups, and return the environment that names it."""
    lines = [f"repository: {depot.reference}", "groups:"]
    lines += [f"  {name}: {{volume: {disk}, {what}}}" for name, what in groups.items()]
    path = disk.parent / "config.yaml"
    path.write_text("\n".join(lines) + "\n")
    return depot.env | {"BLOCKFERRY_CONFIG": str(path), "BLOCKFERRY_STATE_DIR": str(disk.parent / "state")}


def same_trees(one: Path, other: Path) -> None:
    run("diff", "-r", "--no-dereference", one, other)


def test_a_group_is_backed_up_by_its_name_and_comes_back(disk: Path, depot: Depot, tmp_path: Path) -> None:
    env = configured(disk, depot, mail=f"paths: [{disk}/mail, {disk}/both]")
    first = blockferry("backup", "mail", "--json", env=env).json()
    assert (first["group"], first["tier"], first["problems"]) == ("mail", "used", [])
    (disk / "mail" / "new").write_bytes(b"new" * 5000)
    (disk / "both" / "file-3").unlink()
    second = blockferry("backup", "mail", "--json", env=env).json()
    assert (second["tier"], second["base"]) == ("changed", first["snapshot"])
    assert second["bytes_changed"] == 15000
    assert second["bytes_read"] < 32768
    blockferry("files", "latest", "--to", tmp_path / "back", env=env)
    for name in ("mail", "both"):
        same_trees(disk / name, tmp_path / "back" / name)
    assert not (tmp_path / "back" / "www").exists()
    depot.check()


@restic_first
def test_since_none_reads_everything_and_since_a_snapshot_what_is_not_in_that(disk: Path, depot: Depot) -> None:
    env = configured(disk, depot, mail=f"paths: [{disk}/mail]")
    first = blockferry("backup", "mail", "--json", env=env).json()
    (disk / "mail" / "new").write_bytes(b"new" * 5000)
    blockferry("backup", "mail", "--json", env=env).json()
    again = blockferry("backup", "mail", "--since", first["snapshot"], "--json", env=env).json()
    assert (again["base"], again["bytes_changed"]) == (first["snapshot"], 15000)
    whole = blockferry("backup", "mail", "--since", "none", "--json", env=env).json()
    assert (whole["base"], whole["bytes_changed"]) == (None, whole["bytes_used"])


def sectors_read(disk: Path) -> int:
    device = os.stat(disk).st_dev
    return int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()[2])


@pytest.mark.thorough
def test_groups_that_are_due_together_share_one_read_of_what_both_have(tmp_path: Path, disk: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    shared = disk / "both" / "large"
    shared.write_bytes(random.Random(5).randbytes(12 * MIB))
    env = configured(
        disk,
        depot,
        mail=f"paths: [{disk}/mail, {disk}/both], schedule: yearly",
        www=f"paths: [{disk}/www, {disk}/both], schedule: yearly",
        never=f"paths: [{disk}/mail]",
    )
    os.sync()
    before = sectors_read(disk)
    done = blockferry("backup", "--due", "--json", env=env).json()["groups"]
    read = (sectors_read(disk) - before) * 512
    assert [each["group"] for each in done] == ["mail", "www"]
    assert all(each["bytes_used"] > 12 * MIB for each in done)
    assert 12 * MIB < read < 20 * MIB
    shown = blockferry("schedule", "show", "--json", env=env).json()["groups"]
    assert [(each["name"], each["ok"], each["due"]) for each in shown] == [("mail", True, False), ("www", True, False)]
    assert blockferry("backup", "--due", "--json", env=env).json()["groups"] == []
    for name in ("mail", "www"):
        snapshot = next(each["snapshot"] for each in done if each["group"] == name)
        blockferry("files", snapshot, "--to", tmp_path / name, env=env)
        same_trees(disk / "both", tmp_path / name / "both")
        same_trees(disk / name, tmp_path / name / name)


def test_a_group_that_cannot_be_stored_does_not_keep_others_from_it(tmp_path: Path, disk: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    env = configured(disk, depot, mail=f"paths: [{disk}/mail], schedule: yearly")
    config = Path(env["BLOCKFERRY_CONFIG"])
    config.write_text(config.read_text() + "  gone: {volume: /nowhere, schedule: yearly}\n")
    done = blockferry("backup", "--due", "--json", env=env)
    assert done.code == 1
    assert "/nowhere" in done.err
    groups = {each["group"]: each for each in json.loads(done.out)["groups"]}
    assert "snapshot" in groups["mail"]
    assert "/nowhere" in groups["gone"]["error"]


@borg_first
def test_old_snapshots_go_by_the_rules_of_the_group(disk: Path, depot: Depot) -> None:
    env = configured(disk, depot, mail=f"paths: [{disk}/mail], keep_last: 2", www=f"paths: [{disk}/www]")
    made = []
    for number in range(4):
        (disk / "mail" / "new").write_text(str(number))
        made.append(blockferry("backup", "mail", "--json", env=env).json()["snapshot"])
        blockferry("backup", "www", "--json", env=env).json()
    listed = blockferry("snapshots", "--json", env=env).json()["snapshots"]
    assert [each["id"] for each in listed if each["volume"] == "mail"] == made[-2:]
    assert len([each for each in listed if each["volume"] == "www"]) == 4
    depot.check()


def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_stored(disk: Path, depot: Depot, tmp_path: Path) -> None:
    env = configured(disk, depot, mail=f"paths: [{disk}/mail, {disk}/missing]")
    done = blockferry("backup", "mail", "--json", env=env)
    assert done.code == 3
    assert [each["path"] for each in json.loads(done.out)["problems"]] == [f"{disk}/missing"]
    assert "missing" in done.err
    blockferry("files", "latest", "--to", tmp_path / "back", env=env)
    same_trees(disk / "mail", tmp_path / "back" / "mail")


def test_a_base_that_is_not_to_be_had_any_more_costs_a_full_backup(disk: Path, tmp_path: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    env = configured(disk, depot, mail=f"paths: [{disk}/mail]")
    blockferry("backup", "mail", "--json", env=env).json()
    for pack in (depot.path / "data").glob("*/*"):
        if pack.stat().st_size > 100_000:
            pack.unlink()
    depot.stock("repair", "index")
    (disk / "mail" / "new").write_bytes(b"new")
    second = blockferry("backup", "mail", "--json", env=env).json()
    assert second["base"] is None
    assert "no longer has" in second["tier_reason"]
    blockferry("files", "latest", "--to", tmp_path / "back", env=env)
    same_trees(disk / "mail", tmp_path / "back" / "mail")


@pytest.mark.skipif(bool(why_no_bpftrace()), reason=why_no_bpftrace())
@borg_first
def test_where_a_tracker_watches_only_the_blocks_that_were_written_are_read(
    disk: Path, depot: Depot, tmp_path: Path
) -> None:
    env = configured(disk, depot, big=f"paths: [{disk}/big]") | {"BLOCKFERRY_RUNTIME_DIR": "/run/bf-groups"}
    device = run("findmnt", "--noheadings", "--output", "SOURCE", disk).strip()
    (disk / "big").mkdir()
    (disk / "big" / "database").write_bytes(random.Random(9).randbytes(20 * MIB))
    blockferry("track", "start", device, env=env)
    try:
        first = blockferry("backup", "big", "--json", env=env).json()
        with (disk / "big" / "database").open("r+b") as file:
            for place in (3 * MIB, 11 * MIB + 4096):
                file.seek(place)
                file.write(b"changed" * 500)
        second = blockferry("backup", "big", "--json", env=env).json()
        (disk / "big" / "database").rename(disk / "big" / "moved")  # the blocks are as they were
        third = blockferry("backup", "big", "--json", env=env).json()
    finally:
        blockferry("track", "stop", device, env=env)
        shutil.rmtree("/run/bf-groups", ignore_errors=True)
    assert first["bytes_changed"] == 20 * MIB
    assert 0 < second["bytes_changed"] <= MIB
    assert "bpftrace" in second["tracker"]
    assert third["bytes_changed"] <= 128 << 10  # neighbours of the directory
    blockferry("files", "latest", "--to", tmp_path / "back", env=env)
    same_trees(disk / "big", tmp_path / "back" / "big")
    depot.check()


def test_options_of_volumes_are_refused_for_groups(disk: Path, tmp_path: Path) -> None:
    env = configured(disk, Depot("restic", tmp_path / "repository", {}), mail=f"paths: [{disk}/mail]")
    for option in (("--incremental",), ("--fsfreeze", "3"), ("--tracker", "bpf"), ("--name", "x")):
        blockferry("backup", "mail", *option, env=env).refused(2, option[0], "group of files")


def test_nothing_to_back_up_and_due_with_a_volume_are_refused(tmp_path: Path) -> None:
    blockferry("backup").refused(2, "--due")
    blockferry("backup", "--due", tmp_path).refused(2, "--due takes no volume")


def test_where_a_group_lies_is_told(disk: Path, tmp_path: Path) -> None:
    env = configured(disk, Depot("restic", tmp_path / "repository", {}), mail=f"paths: [{disk}/mail]")
    said = blockferry("group", "mail", "--extents", "--json", env=env).json()
    assert said["entries"] == 32
    assert said["bytes"] == sum(path.stat().st_size for path in (disk / "mail").iterdir())
    assert sum(length for _start, length in said["extents"]) == said["bytes"] - said["beside_bytes"]
    assert said["reads"] <= said["extent_count"] == len(said["extents"])
    blockferry("group", "wail", env=env).refused(2, "wail", "mail")
