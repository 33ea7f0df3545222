"""A logical volume in use is exported from its snapshot, which goes when the export does, whatever that ends of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import run
from conftest import Attach, Mount
from export_support import MIB, Host

pytestmark = pytest.mark.root

GROUP = "blockferry-export"


@pytest.fixture
def device(tmp_path: Path, attach: Attach) -> Iterator[str]:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(120 * MIB)
    run("vgcreate", GROUP, attach(disk))
    run("lvcreate", "--yes", "--size", "32M", "--name", "data", GROUP)
    run("mkfs.ext4", "-q", f"/dev/{GROUP}/data")
    yield f"/dev/{GROUP}/data"
    run("vgremove", "--yes", "--force", GROUP)


def snapshots() -> list[str]:
    return run("lvs", "--noheadings", "--options", "lv_name", "--select", "lv_tags=blockferry", GROUP).split()


@pytest.mark.thorough
def test_its_snapshot_goes_when_it_is_released_or_was_killed(
    device: str, mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path / "host")
    host.directory.mkdir()
    host.configure("")
    for name, value in host.env.items():
        monkeypatch.setenv(name, value)
    mount(device)
    try:
        said = host.export(device)
        assert said["volumes"][0]["freeze"] == "LVM snapshot"
        assert len(snapshots()) == 1
        host.release()
        assert snapshots() == []
        host.export(device)
        host.kill()
        assert len(snapshots()) == 1
        host.ferry("release").refused(1, "killed")
        assert snapshots() == []
    finally:
        host.clear_away()
