"""Old snapshots go by rules that know what lies on what, and what the tools' own rules have torn is found."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from commands_support import Depot, borg_first, restic_first, run
from conftest import Mount
from sets_support import MadeSet, SharedVolume, common_record, make_set

pytestmark = pytest.mark.root

MIB = 1 << 20
NAME = "volume.img"


@pytest.fixture
def image(tmp_path: Path, mount: Mount) -> Path:
    """An image of which it is known what changes: on a filesystem that can copy it without copying anything."""
    host = tmp_path / "host.img"
    run("truncate", "-s", "320M", host)
    run("mkfs.xfs", "-q", "-m", "reflink=1", host)
    image = mount(host) / NAME
    image.write_bytes(random.Random(1).randbytes(12 * MIB))
    return image


def parts_on_a_whole_one(depot: Depot, image: Path) -> list[str]:
    """Store a whole snapshot and two parts on it; return their ids."""
    stored = []
    for number in range(3):
        with image.open("r+b") as file:
            file.seek(number * 5 * MIB)
            file.write(os.urandom(100))
        said = depot.ferry("backup", image, "--incremental", "--json").json()
        assert said["part"] == bool(number)
        stored.append(said["snapshot"])
    return stored


def prune_by_the_stock_tool(depot: Depot) -> None:
    """Keep one snapshot of the volume, as its users would."""
    if depot.tool == "borg":
        depot.stock("prune", "--glob-archives", "volume.img-*", "--keep-last", "1")
    else:
        depot.stock("forget", "--path", "/run/blockferry/mounts/volume.img/tree", "--keep-last", "1")


def listed(depot: Depot) -> dict[str, str | None]:
    """Return the snapshots, and what each lacks."""
    return {each["id"]: each["broken"] for each in depot.ferry("snapshots", "--json").json()["snapshots"]}


@borg_first
def test_what_a_part_lies_on_stays(depot: Depot, image: Path, tmp_path: Path):
    whole, older, newer = parts_on_a_whole_one(depot, image)
    said = depot.ferry("prune", NAME, "--keep-last", 1, "--json").json()
    assert said["volumes"] == [{"volume": NAME, "stay": [whole, older, newer], "removed": [], "broken": {}}]
    merged = depot.ferry("merge", newer, "--json").json()["snapshot"]
    planned = depot.ferry("prune", NAME, "--keep-last", 1, "--dry-run", "--json").json()
    assert set(listed(depot)) == {whole, older, newer, merged}
    done = depot.ferry("prune", NAME, "--keep-last", 1, "--json").json()
    assert done["volumes"] == planned["volumes"]
    assert listed(depot) == {merged: None}
    assert depot.ferry("restore", merged, tmp_path / "restored").code == 0
    assert (tmp_path / "restored").read_bytes() == image.read_bytes()


@restic_first
def test_what_the_tool_s_own_rules_have_torn_is_found_and_not_built_on(depot: Depot, image: Path, tmp_path: Path):
    whole, older, newer = parts_on_a_whole_one(depot, image)
    prune_by_the_stock_tool(depot)
    assert listed(depot) == {newer: f"needs {older}, which is gone"}
    depot.ferry("restore", newer, tmp_path / "restored").refused(1, f"needs snapshot {older}, which is gone")
    again = depot.ferry("backup", image, "--incremental", "--json").json()
    assert not again["part"]
    assert f"needs snapshot {older}, which is gone" in again["tier_reason"]
    assert depot.ferry("restore", again["snapshot"], tmp_path / "restored").code == 0
    assert (tmp_path / "restored").read_bytes() == image.read_bytes()
    said = depot.ferry("prune", NAME, "--keep-last", 5, "--broken", "--json").json()
    assert said["volumes"][0]["removed"] == [newer]
    assert listed(depot) == {again["snapshot"]: None}
    assert whole not in listed(depot)


@restic_first
def test_a_volume_s_own_rules_are_applied_after_each_backup(depot: Depot, image: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(f"volumes: {{vm: {{path: {image}, keep_last: 2}}, other: {{path: {image}}}}}")
    made = [
        depot.ferry("backup", name, "--json", BLOCKFERRY_CONFIG=str(config)).json()["snapshot"]
        for name in ("vm", "other", "vm", "vm")
    ]
    assert list(listed(depot)) == made[1:]


@pytest.mark.thorough
def test_a_broken_snapshot_keeps_no_place(depot: Depot, image: Path):
    *_bases, newer = parts_on_a_whole_one(depot, image)
    prune_by_the_stock_tool(depot)
    usable = depot.ferry("backup", image, "--tracker", "none", "--json").json()["snapshot"]
    said = depot.ferry("prune", NAME, "--keep-last", 1, "--json").json()
    assert said["volumes"][0]["stay"] == [usable]
    assert set(listed(depot)) == {newer, usable}


@pytest.fixture
def made(depot: Depot) -> list[MadeSet]:
    """Two sets of the same volume in the depot."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in depot.env.items():
            patch.setenv(name, value)
        repository = repository_named(plugin_manager(), depot.reference)
        sets = []
        for seed in range(2):
            content = random.Random(seed).randbytes(3 * MIB)
            record = common_record(len(content), repository.unit(len(content)), volume=NAME)
            cuts = [ExtentSet.from_ranges([0], [MIB]), ExtentSet.from_ranges([MIB], [3 * MIB])]
            writes = {1: [(0, b"later")], 2: [(2 * MIB, b"later still")]}
            whole = ExtentSet.whole(len(content))
            sets.append(make_set(repository, SharedVolume(content), whole, cuts, writes, record))
        repository.close()
        return sets


def test_the_tool_s_own_rules_leave_the_shares_of_a_set(depot: Depot, made: list[MadeSet], tmp_path: Path):
    old, new = made
    prune_by_the_stock_tool(depot)
    assert listed(depot) == {new.snapshot.id: None}
    assert depot.ferry("restore", new.snapshot.id, tmp_path / "restored").code == 0
    new.assert_is((tmp_path / "restored").read_bytes())
    said = depot.ferry("prune", NAME, "--keep-last", 1, "--json").json()
    assert set(said["volumes"][0]["removed"]) == {share.id for share in old.shares}
    assert len(depot.archives()) == 3


@borg_first
def test_a_set_whose_share_is_gone_is_found(depot: Depot, made: list[MadeSet]):
    share = made[0].shares[0]
    depot.stock("delete" if depot.tool == "borg" else "forget", *_named(depot, share.archive))
    assert listed(depot) == {made[0].snapshot.id: f"needs {share.id}, which is gone", made[1].snapshot.id: None}


def _named(depot: Depot, archive: str) -> list[str]:
    return [f"::{archive}"] if depot.tool == "borg" else [archive]


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_bad_input_is_refused(depot: Depot, image: Path):
    depot.ferry("prune", NAME).refused(2, "no rule keeps anything")
    depot.ferry("prune", NAME, "--keep-last", 0).refused(2, "no rule keeps anything")
    assert depot.ferry("backup", image).code == 0
    depot.ferry("prune", "other", "--keep-last", 1).refused(2, f"There are: {NAME}")
