"""What `attach`, `status` and `detach` refuse: the exit code, the words, and that nothing is left."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, run
from conftest import Attach
from hot_support import MIB, Hot, mounted

pytestmark = pytest.mark.root


@pytest.fixture
def depot(tmp_path: Path, depot: Depot) -> Depot:
    """A repository with one snapshot of some noise."""
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(3).randbytes(32 * MIB))
    assert depot.ferry("backup", noise).code == 0
    return depot


@pytest.fixture
def restore(depot: Depot, hot, tmp_path: Path) -> Hot:
    return hot(depot, tmp_path / "target.img")


def sized(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def refused(restore: Hot, code: int, *words: str, target: object = None, options: tuple[object, ...] = ()) -> None:
    """Assert that attaching is refused, and that nothing runs, is mounted, is shown or is remembered."""
    restore.try_to_attach(*options, target=target).refused(code, *words)
    restore.assert_no_traces()
    restore.try_to("status").refused(1, "no such restore")


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_targets_that_are_refused(restore: Hot, attach: Attach, tmp_path):
    filesystem = sized(tmp_path / "filesystem.img", 40 * MIB)
    run("mkfs.ext4", "-q", filesystem)
    before = filesystem.read_bytes()
    device = attach(filesystem)
    refused(restore, 1, "ext4", "--force", target=device)
    refused(restore, 1, "in use", device, target=filesystem)
    with mounted(device, tmp_path / "place") as place:
        refused(restore, 1, "in use", str(place), target=device, options=("--force",))
    assert filesystem.read_bytes()[4096 : 8 * MIB] == before[4096 : 8 * MIB]
    small = attach(sized(tmp_path / "small.img", 30 * MIB))
    refused(restore, 1, "needs", str(32 * MIB), target=small)
    refused(restore, 1, "holds", "--force", target=sized(tmp_path / "file.img", 5))
    refused(restore, 1, "directory", target=tmp_path)
    refused(restore, 1, "no such file", target=tmp_path / "no" / "where")


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_words_that_are_refused(restore: Hot):
    for options in (("--rate", "fast"), ("--rate", "-1"), ("--rate", "nan"), ("--patience", "-1")):
        refused(restore, 2, options[0], options=options)
    restore.try_to_attach(snapshot="0123456789ab").refused(1, "0123456789ab")
    restore.assert_no_traces()
    restore.depot.ferry("attach", "latest", **restore.env).refused(2, "target")
    blockferry("attach", "latest", restore.target, "--name", "../x", "--repo", restore.depot.reference).refused(
        2, "name"
    )
    assert not Path(restore.target).exists()
    restore.try_to("detach").refused(1, "no such restore")


def test_a_wrong_passphrase_is_refused(restore: Hot):
    secret = next(iter(restore.depot.env))
    words = ["attach", "latest", restore.target, "--name", restore.name]
    restore.depot.ferry(*words, **restore.env, **{secret: "wrong"}).refused(1, "pass")
    restore.assert_no_traces()
    assert not Path(restore.target).exists()


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
@pytest.mark.thorough
def test_two_restores_do_not_get_in_each_other_s_way(depot: Depot, restore: Hot, hot, tmp_path):
    restore.attach("--rate", "1M", "--threads", "1")
    other = hot(depot, restore.target)
    other.try_to_attach("--force").refused(75, "in use", restore.name)
    other.assert_no_traces()
    # By the same name: the same restore is what is there already, another one is not.
    assert restore.attach()["process"] == restore.status()["process"]
    restore.try_to_attach("--foreground").refused(75, "attached already")
    restore.try_to_attach(target=tmp_path / "elsewhere").refused(2, "--name")
    (tmp_path / "more.img").write_bytes(b"x" * MIB)
    second = depot.ferry("backup", tmp_path / "more.img", "--json").json()["snapshot"]
    restore.try_to_attach(snapshot=second).refused(2, "attached already", "--name")
    restore.detach()
    restore.try_to_attach(snapshot=second).refused(2, "--forget")
    # Detached, it is still half restored: nobody else may have the target.
    other.try_to_attach("--force").refused(75, "--forget", restore.name)
    restore.assert_no_traces()
    restore.detach("--forget")
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert other.attach("--force")["target"] == str(restore.target)


@pytest.mark.parametrize("depot", ["restic"], indirect=True)
def test_a_restore_that_is_remembered_no_more_is_not_written_over(restore: Hot, attach: Attach, tmp_path):
    """What was written to it since is nowhere else."""
    file = sized(tmp_path / "disk.img", 40 * MIB)
    restore.target = attach(file)
    restore.attach("--rate", "0")
    restore.detach("--forget")
    begun = file.read_bytes()
    restore.try_to_attach().refused(1, "holds a hot restore that is not complete", "--force")
    restore.depot.ferry("restore", "latest", restore.target).refused(1, "holds a hot restore", "--force")
    assert file.read_bytes() == begun
    restore.attach("--force", "--rate", "0")
    restore.detach()


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_another_disk_under_the_same_name_is_not_gone_on_with(restore: Hot, attach: Attach, tmp_path):
    file = sized(tmp_path / "disk.img", 40 * MIB)
    restore.target = attach(file)
    restore.attach("--rate", "1M", "--threads", "1")
    restore.detach()
    begun = file.read_bytes()
    assert begun[512:MIB] == bytes(MIB - 512)
    assert run("wipefs", "--noheadings", file) == ""
    # After a reboot: a disk of somebody else, with a filesystem on it, is called so.
    run("losetup", "--detach", restore.target)
    run("mkfs.ext4", "-q", "-F", file)
    other = file.read_bytes()
    run("losetup", restore.target, file)
    restore.try_to_attach().refused(1, "not what this restore began on", "--forget")
    restore.try_to_attach("--force").refused(1, "not what this restore began on")
    restore.assert_no_traces()
    run("losetup", "--detach", restore.target)
    assert file.read_bytes() == other
    file.write_bytes(begun)
    run("losetup", restore.target, file)
    restore.attach()
    restore.wait_until_finished()
    restore.detach()
    assert file.read_bytes()[: 32 * MIB] == (tmp_path / "noise.img").read_bytes()
