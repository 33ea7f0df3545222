"""The disk of a running machine into a repository and back, as a user does it, with both tools."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, command, new_depot, restic_first, run

pytestmark = [pytest.mark.root, pytest.mark.slow]

FILES = {f"file-{number}": bytes([number]) * (number * 9000) for number in range(1, 40)}


@pytest.fixture(params=["borg", "restic"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Depot:
    return new_depot(request.param, tmp_path / "repository")


@pytest.fixture
def guest(machine, tmp_path: Path) -> Path:
    """The guest's disk, with files on it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, content in FILES.items():
        (tree / name).write_bytes(content)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, machine.guest)
    return machine.guest


@pytest.mark.parametrize("machine", ["qcow2"], indirect=True)
@restic_first
def test_a_running_machines_disk_comes_back(depot: Depot, machine, guest, tmp_path):
    stored = depot.ferry("backup", machine.name, "--name", "vm", "--json").json()
    assert stored["tier"] == "used"
    assert stored["stability"] == "crash-consistent"
    assert stored["bytes_used"] < stored["bytes_volume"] == machine.volume.size
    state = tmp_path / "then.img"
    shutil.copyfile(guest, state)
    run("debugfs", "-w", "-R", "rm file-7", guest)
    machine.write(20 << 20, os.urandom(1 << 20))
    before = machine.leftovers()
    foretold = depot.ferry("backup", machine.name, "--name", "vm", "--dry-run", "--json").json()
    assert machine.leftovers() == before
    again = depot.ferry("backup", machine.name, "--name", "vm", "--json").json()
    assert (again["tier"], again["tracker"]) == ("changed", "QEMU dirty bitmap")
    assert foretold["bytes_changed"] == again["bytes_changed"]
    assert again["bytes_changed"] < stored["bytes_used"] / 2
    assert machine.leftovers() == [f"blockferry-{again['snapshot']}"]
    for snapshot, expected in ((stored["snapshot"], state), (again["snapshot"], guest)):
        target = tmp_path / f"{snapshot}.img"
        depot.ferry("restore", snapshot, target, "--json").json()
        run("e2fsck", "-fn", target)
        out = tmp_path / f"{snapshot}.files"
        out.mkdir()
        run("debugfs", "-R", f"rdump / {out}", target)
        found = {path.name: path.read_bytes() for path in out.glob("file-*")}
        kept = FILES if expected is state else {name: data for name, data in FILES.items() if name != "file-7"}
        assert found == kept
        copy = tmp_path / "copy.img"
        shutil.copyfile(expected, copy)
        assert depot.ferry("verify", snapshot, "--against", copy, "--json").json()["bytes_compared"]
    depot.check()


@pytest.mark.parametrize("machine", ["qcow2"], indirect=True)
def test_a_killed_backup_leaves_nothing_in_the_machine(depot: Depot, machine, guest, tmp_path):
    for _ in range(3):
        running = subprocess.Popen(
            command("backup", machine.name, "--repo", depot.reference),
            env=os.environ | depot.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while "blockferry-backup" not in machine.leftovers() and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = depot.ferry("backup", machine.name, "--json")
    if depot.tool == "restic" and done.code:
        depot.stock("unlock")
        done = depot.ferry("backup", machine.name, "--json")
    assert done.code == 0, done.err
    assert machine.leftovers() == [f"blockferry-{done.json()['snapshot']}"]
    copy = tmp_path / "copy.img"
    shutil.copyfile(guest, copy)
    assert depot.ferry("verify", "latest", "--against", copy).code == 0


@pytest.mark.parametrize("machine", ["raw"], indirect=True)
def test_what_cannot_be_is_said_in_a_sentence(machine, tmp_path):
    depot = Depot("restic", tmp_path / "none", {"RESTIC_PASSWORD": "x"})
    depot.ferry("backup", "qemu:disk0").refused(2, "qemu:SOCKET:NODE")
    depot.ferry("backup", f"qemu:{machine.directory}/qmp:nothing").refused(1, "no block node nothing", "disk0")
    depot.ferry("backup", f"qemu:{machine.directory}/gone:disk0").refused(1, "No such file")
    blockferry("used", machine.name).refused(1, "held still")
