"""Logical volumes in use, read from snapshots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockferry.errors import UnstableVolumeError, VolumeError
from blockferry.hookspecs import FreezeOptions
from blockferry.snapshot import Stability
from conftest import Attach, Mount
from freeze_support import hold, keep_open, read

pytestmark = pytest.mark.root

GROUP = "blockferry-test"


def run(*command: str) -> str:
    """Run a command; return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def group(tmp_path: Path, attach: Attach) -> Iterator[str]:
    """A volume group of 160 MiB."""
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 164 << 20)
    run("vgcreate", GROUP, attach(disk))
    yield GROUP
    run("vgremove", "--yes", "--force", GROUP)


@pytest.fixture
def thick(group: str) -> str:
    """A logical volume of 32 MiB with ext4 on it."""
    run("lvcreate", "--yes", "--size", "32M", "--name", "data", group)
    run("mkfs.ext4", "-q", f"/dev/{group}/data")
    return f"/dev/{group}/data"


@pytest.fixture
def thin(group: str) -> str:
    """The same from a thin pool."""
    run("lvcreate", "--yes", "--size", "80M", "--thin", f"{group}/pool")
    run("lvcreate", "--yes", "--virtualsize", "32M", "--thin", "--name", "data", f"{group}/pool")
    run("mkfs.ext4", "-q", f"/dev/{group}/data")
    return f"/dev/{group}/data"


def snapshots() -> list[str]:
    """Return the names of all snapshots that backups made."""
    return run("lvs", "--noheadings", "--options", "lv_name", "--select", "lv_tags=blockferry", GROUP).split()


@pytest.fixture(params=[("thick", "LVM snapshot"), ("thin", "LVM thin snapshot")])
def volume(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A volume of either kind, and what its snapshot is called."""
    kind, method = request.param
    return request.getfixturevalue(kind), method


def test_a_mounted_volume_is_read_from_a_snapshot_that_needs_no_repair(
    volume: tuple[str, str], mount: Mount, tmp_path: Path
) -> None:
    device, method = volume
    place = mount(device)
    (place / "before").write_bytes(b"BEFORE" * 10_000)
    with hold(device) as frozen:
        assert (frozen.stability, frozen.method) == (Stability.FROZEN, method)
        assert len(snapshots()) == 1
        (place / "after").write_bytes(b"AFTER!" * 10_000)
        os.sync()
        copy = read(frozen)
        frozen.check()
    assert snapshots() == []
    assert b"BEFORE" * 600 in copy
    assert b"AFTER!" * 600 not in copy
    (tmp_path / "copy.img").write_bytes(copy)
    run("e2fsck", "-f", "-n", str(tmp_path / "copy.img"))


@pytest.mark.thorough
def test_a_snapshot_that_overflows_fails_the_backup(thick: str, mount: Mount) -> None:
    run("lvcreate", "--yes", "--size", "120M", "--name", "filler", GROUP)  # leaves 8 MiB
    place = mount(thick)
    with hold(thick) as frozen:
        frozen.check()
        (place / "much").write_bytes(os.urandom(20 << 20))
        os.sync()
        with pytest.raises(VolumeError, match="snapshot was full") as raised:
            frozen.check()
        assert "vgs" in raised.value.remedy
    assert snapshots() == []


@pytest.mark.thorough
def test_a_group_without_room_declines_with_the_reason(thick: str, mount: Mount) -> None:
    run("lvcreate", "--yes", "--extents", "100%FREE", "--name", "filler", GROUP)
    mount(thick)
    with pytest.raises(UnstableVolumeError, match=f"lvm: the group {GROUP} has no free extents"):
        hold(thick).__enter__()


@pytest.mark.thorough
def test_an_error_in_the_backup_removes_the_snapshot(thick: str, mount: Mount) -> None:
    mount(thick)
    with pytest.raises(ZeroDivisionError), hold(thick):
        raise ZeroDivisionError
    assert snapshots() == []


HOLDER = """
import sys, time
from freeze_support import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.thorough
def test_what_a_killed_backup_left_goes_and_what_another_reads_stays(thick: str, mount: Mount) -> None:
    mount(thick)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    other = subprocess.Popen([sys.executable, "-c", HOLDER, thick], stdout=subprocess.PIPE, env=environment)
    assert other.stdout is not None
    with other.stdout:
        assert other.stdout.readline() == b"held\n"
    (first,) = snapshots()
    with hold(thick):
        assert first in snapshots()
    assert snapshots() == [first]
    other.kill()
    other.wait()
    assert snapshots() == [first]
    with hold(thick):
        assert first not in snapshots()
    assert snapshots() == []


@pytest.mark.thorough
def test_a_volume_that_a_guest_uses_raw_is_crash_consistent(thick: str) -> None:
    machine = keep_open(thick)
    try:
        with hold(thick) as frozen:
            assert (frozen.stability, frozen.method) == (Stability.CRASH_CONSISTENT, "LVM snapshot")
    finally:
        machine.kill()
        machine.wait()


@pytest.mark.thorough
def test_a_volume_in_no_use_needs_no_snapshot(thick: str) -> None:
    with hold(thick) as frozen:
        assert frozen.stability is Stability.OFFLINE
        assert snapshots() == []


@pytest.mark.thorough
def test_a_snapshot_is_preferred_to_freezing_for_the_length_of_the_backup(thick: str, mount: Mount) -> None:
    place = mount(thick)
    with hold(thick, FreezeOptions(fsfreeze_seconds=60)) as frozen:
        assert frozen.method == "LVM snapshot"
        (place / "not").write_bytes(b"held back")


@pytest.mark.thorough
def test_what_lies_on_a_logical_volume_has_its_disk_in_use(thick: str) -> None:
    disk = run("pvs", "--noheadings", "--options", "pv_name", "--select", f"vg_name={GROUP}").strip()
    with pytest.raises(UnstableVolumeError, match=rf"{disk} is held by dm-\d+ \(blockferry--test-data\)"):
        hold(disk).__enter__()
    assert thick


@pytest.mark.thorough
def test_a_second_backup_of_a_volume_in_use_reads_what_changed(
    volume: tuple[str, str], mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, method = volume
    tracker = {"LVM snapshot": "dmsnapshot", "LVM thin snapshot": "thin"}[method]
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    repository = tmp_path / "repository"
    run("restic", "init", "--quiet", "--repo", str(repository))
    place = mount(device)
    contents = {"one": os.urandom(5 << 20), "two": os.urandom(3 << 20)}
    done = []
    for name, content in contents.items():
        (place / name).write_bytes(content)
        os.sync()
        done.append(blockferry("backup", device, "--tracker", tracker, "--repo", f"restic:{repository}"))
    first, second = done
    assert (first["tier"], second["tier"], second["base"]) == ("used", "changed", first["snapshot"])
    assert second["bytes_changed"] < first["bytes_read"]
    assert second["bytes_compared"] > 0
    names = run("lvs", "--noheadings", "--options", "lv_name", GROUP).split()
    assert [name for name in names if "blockferry-" in name] == [f"blockferry-{second['snapshot']}"]
    copy = tmp_path / "copy.img"
    blockferry("restore", "latest", str(copy), "--repo", f"restic:{repository}")
    restored = mount(copy, "loop", "ro")
    assert {name: (restored / name).read_bytes() for name in contents} == contents


def blockferry(*words: str) -> dict[str, Any]:
    """Run a command of blockferry's; return what it prints."""
    command = [str(Path(sys.executable).with_name("blockferry")), *words, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed
