"""A guest that systemd started is shut down while its volumes are used: they are unmounted first, and soon.

One is behind a guard, the other is being restored, by udev's rule, onto a disk that was there at boot.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockferry.systemd import units
from commands_support import PASSPHRASE, Depot, blockferry, new_depot, run
from conftest import Attach, Mount

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "shared-volumes.md"
SIZE = "96M"
LUN = "/dev/disk/by-id/ata-QEMU_HARDDISK_LUN0"
BOUND = 90
"""Seconds: what systemd gives a unit to end; one that takes more is killed."""

INSIDE = """
set -eu
until systemctl is-active --quiet 'blockferry-restore@serial:SPARE' && systemctl is-active --quiet srv.mount; do
    systemctl is-failed --quiet 'blockferry-restore@serial:SPARE' srv.mount && exit 3
    sleep 0.5
done
mountpoint /mnt
cp "$CONTENT" /srv/new
cp "$CONTENT" /mnt/new
echo "done at $(cut -d' ' -f1 /proc/uptime)"
"""
"""What is written here nobody syncs: that it is there later is the shutdown's doing."""


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    """A repository that holds an ext4 volume."""
    files, image = tmp_path / "files", tmp_path / "volume.img"
    files.mkdir()
    (files / "old").write_bytes(os.urandom(30 << 20))
    run("truncate", "-s", SIZE, image)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, image)
    made = new_depot("restic", tmp_path / "repository")
    assert made.ferry("backup", image).code == 0
    return made


@pytest.fixture
def etc(tmp_path: Path, depot: Depot, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guest has besides this machine's files: the units, as for an image, a guard's fstab, an armed disk."""
    root = tmp_path / "root"
    monkeypatch.delenv("BLOCKFERRY_STATE_DIR")
    monkeypatch.delenv("BLOCKFERRY_CONFIG")
    for command in ("systemd", "udev"):
        assert blockferry(command, "install", "--root", root).code == 0
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    words = ("arm", "latest", "serial:SPARE", "--name", "spare", "--mount", "/mnt", "--rate", "100K")
    assert depot.ferry(*words).code == 0
    guard = root / "etc/systemd/system/remote-fs.target.wants" / units.GUARD.replace("@", "@lun0")
    guard.parent.mkdir()
    guard.symlink_to(f"/etc/systemd/system/{units.GUARD}")
    private = root / "etc/blockferry"
    private.mkdir(mode=0o700)
    (private / "environment").write_text(f"RESTIC_PASSWORD={PASSPHRASE}\n")
    (private / "guard-lun0").write_text(f"VOLUME={LUN}\nBLOCKFERRY_INDEX=sqlite:///var/lib/index.db\n")
    # Disks are found late here.
    device = run("systemd-escape", "--path", "--suffix=device", LUN).strip()
    late = root / "etc/systemd/system" / f"{guard.name}.d" / "late.conf"
    late.parent.mkdir()
    late.write_text(f"[Unit]\nWants={device}\nAfter={device}\n")
    (line,) = re.findall(r"^/run/blockferry/guard/lun0.disk .*$", PAGE.read_text(), re.MULTILINE)
    line = line.replace("ocfs2", "ext4").replace("x-systemd.requires=o2cb.service,", "")
    (root / "etc/fstab").write_text(line + "\n")
    own = root / "usr/local/bin/blockferry"
    own.parent.mkdir(parents=True)
    python, paths = Path(sys.executable), os.environ.get("PYTHONPATH", "")
    own.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec {python} {python.with_name("blockferry")} "$@"\n')
    own.chmod(0o755)
    return root


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_what_was_written_to_a_guarded_and_a_restored_volume_outlives_a_shutdown(
    depot: Depot, etc: Path, tmp_path: Path, attach: Attach, mount: Mount
) -> None:
    spare, lun, sample = tmp_path / "spare.img", tmp_path / "lun0.img", tmp_path / "sample"
    sample.write_bytes(os.urandom(8 << 20))
    options = "-device ahci,id=sata"
    for port, (image, serial) in enumerate([(spare, "SPARE"), (lun, "LUN0")]):
        run("truncate", "-s", SIZE, image)
        options += f" -drive file={image},format=raw,if=none,id={serial}"
        options += f" -device ide-hd,drive={serial},serial={serial},bus=sata.{port}"
    run("mke2fs", "-q", "-t", "ext4", lun)
    command = [ROOT / "scripts/vm", "--disable-microvm", "--verbose", f"--systemd={etc}", f"--qemu-opts={options}"]
    # What is on the disk is known from there.
    command += ["--rwdir", f"/var/lib/blockferry={tmp_path / 'state'}"]
    command += ["--", "env", f"CONTENT={sample}", "sh", "-c", INSIDE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (written_at,) = re.findall(r"^done at (.*)", done.stdout, re.MULTILINE)
    seconds = down_at(said) - float(written_at)
    assert 0 < seconds < BOUND, said
    assert "timed out" not in said

    digest = digest_of(sample)
    assert digest_of(mount(attach(lun)) / "new") == digest
    attached = depot.ferry("attach", "latest", attach(spare), "--name", "spare", "--json").json()
    assert digest_of(mount(attached["device"]) / "new") == digest
    run("umount", attached["device"])
    assert blockferry("detach", "spare", "--json").code == 0


def down_at(console: str) -> float:
    """Return when a guest had its power turned off, by its own clock."""
    (seconds,) = re.findall(r"\[ *(\d+\.\d+)\] reboot: Power down", console)
    return float(seconds)


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
