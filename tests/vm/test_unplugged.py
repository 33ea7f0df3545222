"""A disk that is pulled out while it is restored: the restore ends, and goes on when the disk is back."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.hot import arming, client, udev
from blockferry.hot.arming import Match
from blockferry.service import NobodyThereError, wait_until_free
from commands_support import blockferry, command, new_depot, run
from udev_support import udevd, wait_for

pytestmark = [pytest.mark.root, pytest.mark.thorough, pytest.mark.timeout(1200)]

SIZE = "40M"
HOSTS = Path("/sys/bus/pseudo/drivers/scsi_debug/adapter0")
PATIENCE = 300


class ScsiDisk:
    """A disk of the kernel's own making, which keeps its content while it is pulled out."""

    @property
    def device(self) -> Path | None:
        return next(HOSTS.glob("host*/target*/*/block/*"), None)

    def pull_out(self) -> None:
        assert self.device
        (self.device / "device" / "delete").write_text("1")
        wait_for(lambda: not self.device, "it to be gone")

    def plug_in(self) -> None:
        (host,) = HOSTS.glob("host*")
        Path("/sys/class/scsi_host", host.name, "scan").write_text("- - -")
        wait_for(lambda: self.device, "it to be there")


@pytest.fixture
def disk() -> Iterator[ScsiDisk]:
    with udevd():
        run("modprobe", "scsi_debug", f"dev_size_mb={SIZE.removesuffix('M')}")
        disk = ScsiDisk()
        wait_for(lambda: disk.device, "it to be there", PATIENCE)
        yield disk
        with contextlib.suppress(NobodyThereError):
            client.ask("scsi", {"do": "detach", "force": True})
            wait_until_free(client.socket_path("scsi"))
        subprocess.run(["modprobe", "-r", "scsi_debug"], check=False)


def status() -> dict[str, object]:
    try:
        return client.ask("scsi", {"do": "status"})
    except NobodyThereError:
        return {}


def test_a_disk_that_is_pulled_out_and_plugged_in_again_is_gone_on_with(
    disk: ScsiDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    depot = new_depot("borg", tmp_path / "repository")
    image = tmp_path / "volume.img"
    run("truncate", "-s", SIZE, image)
    run("mke2fs", "-q", "-t", "ext4", image)
    assert depot.ferry("backup", image).code == 0
    run("udevadm", "settle")
    serial = run(
        "udevadm", "info", "--query=property", "--value", "--property=ID_SERIAL_SHORT", f"/dev/{disk.device.name}"
    )
    match = Match.parse(f"serial:{serial.strip()}")
    disk.pull_out()
    depot.ferry("arm", "latest", match, "--name", "scsi", "--rate", "1", "--json").json()
    watching = subprocess.Popen(command("watch"), env=os.environ | depot.env)
    try:
        disk.plug_in()
        wait_for(status, "the restore", PATIENCE)
        first = status()
        disk.pull_out()
        wait_for(lambda: not status(), "its end", PATIENCE)
        wait_until_free(client.socket_path("scsi"))
        assert "was taken away" in client.socket_path("scsi").with_suffix(".log").read_text()
        assert arming.load(match)
        disk.plug_in()
        wait_for(status, "it to go on", PATIENCE)
        assert status()["process"] != first["process"]
        assert udev.devices_of(match)[0].device_node == status()["target"]
    finally:
        watching.terminate()
        watching.wait(30)
    blockferry("detach", "scsi", "--json").json()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    depot.ferry("arm", "latest", match, "--name", "scsi", "--mount", mnt, "--json").json()
    wait_for(lambda: not arming.load(match) and not status(), "the disk to move to its target", PATIENCE)
    assert mnt.is_mount(), "it stays mounted when it has moved"
    run("umount", mnt)
    blockferry("detach", "scsi", "--json").json()
    run("e2fsck", "-fn", f"/dev/{disk.device.name}")
